"""`minimind compare` and `minimind seeds`: of made answers the truth is known."""

import json
import shutil
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestIndPower, TTestPower
from typer.testing import CliRunner

from minimind.cli.main import app
from minimind.comparison.paired import Outcome, compare, holm, outcomes
from minimind.comparison.seeds import OverSeeds, compare_over_seeds, spread
from minimind.errors import UserError
from tests.project import dvc, git

Rows = dict[tuple[str, int], Outcome]
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


def rows(rights: Sequence[bool], wordings: int = 1) -> Rows:
    """Outcomes of problems, each told in some wordings and answered alike in all."""
    return {
        (f"{problem}-{wording}", 0): Outcome(f"{problem}", "7", right)
        for problem, right in enumerate(rights)
        for wording in range(wordings)
    }


@settings(max_examples=40, deadline=None)
@given(ANSWERS)
def test_p_is_mcnemars(pairs: list[tuple[bool, bool]]) -> None:
    a, b = zip(*pairs, strict=True)
    found = compare("exact", rows(a), rows(b))
    counts = [[pairs.count((x, y)) for y in (True, False)] for x in (True, False)]
    assert found.p == pytest.approx(mcnemar(counts, exact=True).pvalue)
    num = found.only_a + found.only_b
    tail = sum(comb(num, k) for k in range(min(found.only_a, found.only_b) + 1)) / 2**num
    assert found.p == pytest.approx(min(1, 2 * tail))


@settings(max_examples=20, deadline=None)
@given(ANSWERS, st.integers(1, 4))
def test_order_flips_the_sign_and_wordings_are_no_evidence(
    pairs: list[tuple[bool, bool]], wordings: int
) -> None:
    a, b = zip(*pairs, strict=True)
    found = compare("exact", rows(a), rows(b))
    swapped = compare("exact", rows(b, wordings), rows(a, wordings))
    assert swapped.num_rows == found.num_rows * wordings
    assert (swapped.num_problems, swapped.p) == (found.num_problems, found.p)
    assert (swapped.only_a, swapped.only_b) == (found.only_b, found.only_a)
    assert swapped.difference == pytest.approx(-found.difference)
    if found.interval is None or swapped.interval is None:
        assert found.interval is swapped.interval
        assert len(set(np.subtract(b, a, dtype=float))) == 1
    else:
        assert swapped.interval == pytest.approx([-end for end in reversed(found.interval)])
        assert found.interval[0] <= found.difference <= found.interval[1]


def test_a_checkpoint_is_no_better_than_itself() -> None:
    found = compare("exact", rows([True, False] * 9), rows([True, False] * 9))
    assert (found.difference, found.interval, found.p) == (0, None, 1)


def test_a_problem_goes_to_whom_more_of_its_wordings_are_right() -> None:
    a = {(f"{i}", 0): Outcome(f"{i // 3}", "7", i in (0, 3, 4)) for i in range(9)}
    b = {(f"{i}", 0): Outcome(f"{i // 3}", "7", i in (1, 2, 5)) for i in range(9)}
    found = compare("exact", a, b)
    assert (found.num_problems, found.only_a, found.only_b, found.p) == (3, 1, 1, 1)
    assert found.share_a == found.share_b == pytest.approx(1 / 3)


def test_95_of_100_intervals_cover_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of problems in five wordings: counted by rows, intervals would cover it half the time."""
    monkeypatch.setattr("minimind.comparison.paired.NUM_RESAMPLES", 999)
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        a, b = rng.random(150) < 0.5, rng.random(150) < 0.6
        interval = compare("exact", rows(a.tolist(), 5), rows(b.tolist(), 5)).interval
        assert interval is not None
        covered += interval[0] <= 0.1 <= interval[1]
    assert 89 <= covered <= 100  # 95 plus or minus 2.7 standard deviations


def test_holms_correction() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([None]) == [None]


def test_measures_are_those_of_the_report() -> None:
    row = {"id": "1", "problem": "1", "answer": "7", "level": 2, "task": None, "correct": True}
    of_task = row | {"level": None, "task": "equation", "choice_correct": False}
    found = outcomes([row | {"choice_correct": False}, of_task, row | {"choice_correct": None}])
    shares = {name: [one.right for one in of.values()] for name, of in found.items()}
    assert shares == {"level 2": [True, True], "equation": [False], "choice": [False]}
    assert list(found) == ["level 2", "equation", "choice"]


def test_other_problems_are_not_compared() -> None:
    other = {key: Outcome(one.problem, "8", one.right) for key, one in rows([True]).items()}
    with pytest.raises(UserError, match="of 0-0 the answer is 7 and 8"):
        compare("exact", rows([True]), other)
    with pytest.raises(UserError, match="no problem in common"):
        compare("exact", rows([True]), {})


def group(shares: Sequence[float], first: int = 1) -> dict[tuple[str, ...], Rows]:
    """A run of each share, at 100 problems, with seeds from the first on."""
    return {
        (f"seed={first + i}",): rows([n < round(100 * s) for n in range(100)])
        for i, s in enumerate(shares)
    }


A, B = [0.5, 0.55, 0.48, 0.52], [0.57, 0.6, 0.5, 0.62]


def test_runs_of_the_same_seeds_are_paired_others_not() -> None:
    paired = compare_over_seeds(group(A), group(B))
    welch = compare_over_seeds(group(A), group(B, first=9))
    differences = np.subtract(B, A)
    assert paired.paired
    assert not welch.paired
    assert paired.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert welch.p == pytest.approx(stats.ttest_ind(B, A, equal_var=False).pvalue)
    expected = stats.ttest_ind(B, A, equal_var=False).confidence_interval()
    assert welch.of_seeds == pytest.approx(tuple(expected))
    expected = stats.ttest_1samp(differences, 0).confidence_interval()
    assert paired.of_seeds == pytest.approx(tuple(expected))
    effect = differences.mean() / differences.std(ddof=1)
    needed = TTestPower().solve_power(effect, alpha=0.05, power=0.8)
    assert paired.further == max(0, np.ceil(needed) - 4)
    effect = differences.mean() / np.sqrt((np.var(A, ddof=1) + np.var(B, ddof=1)) / 2)
    needed = TTestIndPower().solve_power(effect, alpha=0.05, power=0.8)
    assert welch.further == max(0, np.ceil(needed) - 4)


@pytest.mark.parametrize("first", [1, 9])
def test_both_is_wider_than_seeds_and_order_flips_the_sign(first: int) -> None:
    found = compare_over_seeds(group(A), group(B, first))
    swapped = compare_over_seeds(group(B, first), group(A))
    assert found.of_seeds is not None
    assert found.of_both is not None
    assert swapped.of_both is not None
    assert found.of_both[0] < found.of_seeds[0] < found.difference
    assert found.difference < found.of_seeds[1] < found.of_both[1]
    assert swapped.of_both == pytest.approx([-end for end in reversed(found.of_both)])
    assert swapped.p == pytest.approx(found.p)


def test_without_spread_there_is_nothing_to_estimate_from() -> None:
    found = compare_over_seeds(group([0.5, 0.5]), group([0.6, 0.6]))
    assert found == OverSeeds(True, (2, 2), pytest.approx(0.1), None, None, None, None)
    assert spread({("1",): 0.5, ("2",): 0.5}).interval is None


def test_no_difference_needs_more_seeds_than_anybody_has() -> None:
    assert compare_over_seeds(group([0.5, 0.6]), group([0.6, 0.5], 9)).further is None


# A graph of two checkpoints; a model is how well it answers, a of one half and b better.
STEP = """
import json, random, sys, yaml
from pathlib import Path

kind, name = sys.argv[1:]
params = yaml.safe_load(Path("params.yaml").read_text())
if kind == "train":
    share = {"a": 0.5, "b": 0.8}[name] + params[name]["lr"]
    Path("models").mkdir(exist_ok=True)
    Path("models", name).write_text(f"{share} {params['seed']}")
else:
    share, seed = Path("models", name).read_text().split()
    rng = random.Random(f"{name}{seed}")
    Path("predictions").mkdir(exist_ok=True)
    with Path("predictions", f"{name}.jsonl").open("w") as file:
        for n in range(40):
            row = {"id": f"{n}", "problem": f"{n}", "level": 1, "task": None, "prompt": "?"}
            row |= {"output": "7", "answer": "7", "correct": rng.random() < float(share)}
            file.write(json.dumps(row | {"choice_correct": None}) + chr(10))
"""
GRAPH = """
stages:
  train:
    foreach: [a, b]
    do:
      cmd: python step.py train ${item}
      deps: [step.py]
      params: ["${item}", seed]
      outs: ["models/${item}"]
  evaluate:
    foreach: {a: models/a, b: models/b}
    do:
      cmd: python step.py evaluate ${key}
      deps: [step.py, "${item}"]
      outs: ["predictions/${key}.jsonl"]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeds 1 to 3, on main, a branch and in an experiment; another lr of b on branch `other`."""
    folder = tmp_path_factory.mktemp("compare")
    params = "seed: 1\na: {lr: 0.0}\nb: {lr: 0.0}\n"
    for name, text in {"step.py": STEP, "dvc.yaml": GRAPH, "params.yaml": params}.items():
        (folder / name).write_text(text, encoding="utf-8")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "config", "user.name", "test")
    git(folder, "config", "user.email", "test@example.org")
    dvc(folder, "init", "-q")

    def commit(branch: str, params: str) -> None:
        git(folder, "checkout", "-qB", branch)
        (folder / "params.yaml").write_text(params, encoding="utf-8")
        dvc(folder, "repro", "-q")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", branch)

    commit("main", params)
    commit("seed2", params.replace("1", "2"))
    git(folder, "checkout", "-q", "main")
    commit("other", params.replace("b: {lr: 0.0}", "b: {lr: -0.5}"))
    git(folder, "checkout", "-q", "main")
    dvc(folder, "exp", "run", "-q", "--name", "third", "-S", "seed=3")
    git(folder, "checkout", "-q", ".")  # the workspace's predictions stay those of seed 3
    return folder


def run(project: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.chdir(project)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("\n") == (result.exit_code != 0)
    return result.exit_code, result.stdout, result.stderr


def compared(project: Path, monkeypatch: pytest.MonkeyPatch, *said: str) -> dict[str, Any]:
    code, printed, complaint = run(project, monkeypatch, "compare", *said, "--json")
    assert code == 0, complaint
    return json.loads(printed)


def test_checkpoints_are_found_wherever_they_are(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions are those of dvc.lock, from the cache: the workspace has other ones."""
    said = ["a", "models/b", "b@seed2", "third:models/b", "other~0:b"]
    found = compared(project, monkeypatch, *said)["comparisons"]
    assert [row["b"] for row in found] == ["b", "b@seed2", "b@third", "b@other~0"]
    assert {row["by_problem"]["num_problems"] for row in found} == {40}
    assert [row["by_problem"]["difference"] > 0 for row in found] == [True, True, True, False]
    assert all(row["p_holm"] >= row["by_problem"]["p"] for row in found)


def test_runs_that_differ_in_nothing_but_the_seed_are_one_group(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compared(project, monkeypatch, "a", "b", "b@other")
    seeds = {row["checkpoint"]: row["num_seeds"] for row in found["over_seeds"]}
    assert seeds == {"a": 3, "b": 3}
    assert [row["over_seeds"] is None for row in found["comparisons"]] == [False, True]
    assert found["comparisons"][0]["over_seeds"]["paired"]
    of_one = compared(project, monkeypatch, "a", "a@seed2")
    assert of_one["comparisons"][0]["over_seeds"] is None


def test_of_revisions_each_checkpoint_that_changed_is_compared(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compared(project, monkeypatch, "main", "other")
    assert [(row["a"], row["b"]) for row in found["comparisons"]] == [("b@main", "b@other")]
    assert found["unchanged"] == ["a@other"]
    code, printed, _ = run(project, monkeypatch, "compare", "main", "main")
    assert code == 0
    assert "not compared: a@main, b@main" in printed


def test_every_table_says_what_its_interval_covers(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, printed, _ = run(project, monkeypatch, "compare", "a", "b", "--md")
    by_problem, by_seed, differences = printed.split("## ")[1:]
    assert "over problems, not over seeds" in by_problem
    assert "over seeds, not over problems" in by_seed
    assert "over seeds and problems" in differences
    assert "| a → b | level 1 |" in by_problem


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (["a"], "name two or more"),
        (["a", "nix"], "'nix' is no evaluated checkpoint (a, b), revision or experiment"),
        (["a", "a@nix"], "'nix' is no evaluated checkpoint"),
        (["a", "nix@main"], "main has no evaluated checkpoint 'nix'; it has a, b"),
        (["a", "main"], "compare a@main"),
    ],
)
def test_what_is_not_there_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], complaint: str
) -> None:
    code, _, printed = run(project, monkeypatch, "compare", *said)
    assert code == 1
    assert complaint in printed


def test_without_git_there_is_the_workspace_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns(".git"))
    found = compared(tmp_path / "copy", monkeypatch, "a", "b")
    assert [row["b"] for row in found["comparisons"]] == ["b"]
    assert not found["over_seeds"]
    code, _, complaint = run(tmp_path / "copy", monkeypatch, "compare", "a", "main")
    assert code == 1
    assert "'main' is no evaluated checkpoint (a, b), revision or experiment" in complaint


def test_a_lock_of_several_runs_is_in_no_group(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an experiment leaves it that failed after training."""
    lock = (project / "dvc.lock").read_text(encoding="utf-8")
    trained = yaml.safe_load(lock)
    trained["stages"]["train@a"]["outs"][0]["md5"] = "0" * 32
    try:
        (project / "dvc.lock").write_text(yaml.safe_dump(trained), encoding="utf-8")
        _, printed, _ = run(project, monkeypatch, "compare", "a", "b")
    finally:
        (project / "dvc.lock").write_text(lock, encoding="utf-8")
    assert "a: out of date" in printed
    assert "| b " in printed.split("## Over seeds")[1]
    assert "| a " not in printed.split("## Over seeds")[1]


def test_seeds_are_queued_once_and_from_a_commit(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed, complaint = run(project, monkeypatch, "seeds", "2", "-S", "b.lr=0.1")
    assert code == 0, complaint
    names = [line.split(":")[0] for line in printed.splitlines()[:2]]
    assert [name.rpartition("-")[0] for name in names] == ["seed-2-b-lr=0-1", "seed-3-b-lr=0-1"]
    _, printed, _ = run(project, monkeypatch, "seeds", "1", "-S", "b.lr=0.1")
    assert [f"{name}: there already" in printed for name in names] == [True, True]
    assert "seed-4-b-lr=0-1" in printed
    code, _, complaint = run(project, monkeypatch, "seeds", "1", "-S", "seed=3")
    assert code == 1
    assert "counts up" in complaint
    code, _, complaint = run(project, monkeypatch, "seeds", "1", "-S", "b.nix=0.1")
    assert (code, "params.yaml has no b.nix" in complaint) == (1, True)
    params = (project / "params.yaml").read_text(encoding="utf-8")
    try:
        (project / "params.yaml").write_text(params + "c: 1\n", encoding="utf-8")
        code, _, complaint = run(project, monkeypatch, "seeds", "1")
    finally:
        (project / "params.yaml").write_text(params, encoding="utf-8")
    assert code == 1
    assert "params.yaml is not committed" in complaint


def test_data_that_an_experiment_would_not_have_is_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, symlinks=True)
    graph = GRAPH.replace("deps: [step.py]", "deps: [step.py, mine/my data.txt]")
    (copy / "dvc.yaml").write_text(graph, encoding="utf-8")
    git(copy, "commit", "-qam", "Data of mine")
    (copy / "mine").mkdir()
    (copy / "mine/my data.txt").write_text("x")
    code, _, complaint = run(copy, monkeypatch, "seeds", "1")
    assert code == 1
    assert "neither git nor DVC tracks 'mine/my data.txt'" in complaint
    assert "`dvc add 'mine/my data.txt'`, and commit" in complaint
    dvc(copy, "add", "-q", "mine")
    git(copy, "add", "-A")
    git(copy, "commit", "-qm", "It is tracked")
    assert run(copy, monkeypatch, "seeds", "1")[0] == 0
    graph = graph.replace("mine/my data.txt", "'${mine}'")
    (copy / "dvc.yaml").write_text(graph, encoding="utf-8")
    with (copy / "params.yaml").open("a", encoding="utf-8") as params:
        params.write("mine: mine/my data.txt\n")
    git(copy, "commit", "-qam", "A parameter says where it is")
    code, _, complaint = run(copy, monkeypatch, "seeds", "1", "-S", "mine=nix")
    assert (code, "mine is 'nix', a path that does not exist" in complaint) == (1, True)
