"""The claims themselves: a run that keeps all of them, and for each claim what breaks it."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claims
from benchmarks.claims import PLANS, missing_plans
from benchmarks.claims_list import CLAIMS, Results, at_least, level, of_sample, within

NUM_PROBLEMS = 100  # of each level and task
# Shares right of levels 1 to 4, of a run that keeps all claims.
EXACT = {
    "pretrain": (0.0, 0.0, 0.0, 0.0),
    "sft": (0.1, 0.05, 0.05, 0.05),
    "dpo": (0.1, 0.05, 0.05, 0.05),
    "reason": (0.98, 0.98, 0.95, 0.3),
    "grpo": (0.98, 0.98, 0.95, 0.5),
    "spo": (0.98, 0.98, 0.95, 0.5),
    "lora": (0.0, 0.0, 0.0, 0.0),
    "distill": (0.8, 0.7, 0.6, 0.2),
    "baseline": (0.2, 0.1, 0.1, 0.0),
}
FULL_SENTENCES = {"sft": 0.5, "dpo": 1.0}


def rows(share: float, what: str, **same: Any) -> list[dict[str, Any]]:
    """Problems of which the first `share` have the flag `what`."""
    flags = {"correct": False, "in_form": True, "full_sentence": False, "complete_think": True}
    flags |= {"choice_correct": False}
    num_with = round(share * NUM_PROBLEMS)
    name = same["task"] or f"l{same['level']}"
    names = [f"{name}-{number:04d}" for number in range(NUM_PROBLEMS)]
    return [
        {"id": name, "problem": name, "answer": "7", **flags, **same, what: number < num_with}
        for number, name in enumerate(names)
    ]


def stories_of(name: str) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for number, share in enumerate(EXACT[name], 1):
        told += rows(share, "correct", task=None, level=number)
    num_full = round(FULL_SENTENCES.get(name, 0.0) * len(told))
    for place, row in enumerate(told):
        row["full_sentence"] = place < num_full
    return told


def kept() -> Results:
    """A run that keeps every claim."""
    training = {
        "pretrain": {"initial_val_loss": 6.0, "val_loss": 1.0},
        "dpo": {"pair_accuracy": 0.95},
        "distill": {"kl_to_teacher": 0.1},
        "baseline": {"kl_to_teacher": 0.3},
    }
    predictions = {name: stories_of(name) for name in EXACT}
    predictions["pretrain"] += rows(0.9, "choice_correct", task="equation", level=None)
    predictions["sft"] += rows(0.0, "correct", task="extraction", level=None)
    predictions["lora"] += rows(0.9, "correct", task="extraction", level=None)
    return Results({"training": training, "held_out_pairs": 400}, predictions)


def broken_claims(results: Results) -> set[str]:
    return {claim.name for claim in CLAIMS if not claim.margin(results).holds}


def share_of(name: str, what: str, share: float, **where: Any) -> Callable[[Results], None]:
    """A change: from now on only so many of these problems have that flag."""

    def change(results: Results) -> None:
        found = [
            row
            for row in results.predictions[name]
            if all(row[key] == value for key, value in where.items())
        ]
        assert found
        for place, row in enumerate(found):
            row[what] = place < round(share * len(found))

    return change


def metric(stage: str, name: str, value: float) -> Callable[[Results], None]:
    def change(results: Results) -> None:
        results.metrics["training"][stage][name] = value

    return change


BREAKS = {
    "pretrain: the right": share_of("pretrain", "choice_correct", 0.2, task="equation"),
    "pretrain: loss": metric("pretrain", "val_loss", 6.5),
    "sft: .95 of": share_of("sft", "in_form", 0.9, task=None),
    "sft: level 1": share_of("pretrain", "correct", 0.03, task=None, level=1),
    "dpo: at most .70": share_of("sft", "full_sentence", 0.8, task=None),
    "dpo: .95 full": share_of("dpo", "full_sentence", 0.9, task=None),
    "dpo: level 1 within": share_of("dpo", "correct", 0.15, task=None, level=1),
    "dpo: pair accuracy": metric("dpo", "pair_accuracy", 0.89),
    "reason: level 1": share_of("reason", "correct", 0.94, task=None, level=1),
    "reason: level 2": share_of("reason", "correct", 0.94, task=None, level=2),
    "reason: level 3": share_of("reason", "correct", 0.89, task=None, level=3),
    "reason: .98": share_of("reason", "complete_think", 0.97, task=None),
    "grpo: level 4": share_of("grpo", "correct", 0.39, task=None, level=4),
    "grpo: level 1": share_of("grpo", "correct", 0.95, task=None, level=1),
    "grpo: level 2": share_of("grpo", "correct", 0.95, task=None, level=2),
    "grpo: level 3": share_of("grpo", "correct", 0.92, task=None, level=3),
    "spo: level 4": share_of("spo", "correct", 0.39, task=None, level=4),
    "spo: level 1": share_of("spo", "correct", 0.95, task=None, level=1),
    "spo: level 2": share_of("spo", "correct", 0.95, task=None, level=2),
    "spo: level 3": share_of("spo", "correct", 0.92, task=None, level=3),
    "lora: at most": share_of("sft", "correct", 0.3, task="extraction"),
    "lora: .60": share_of("lora", "correct", 0.5, task="extraction"),
    "distill: nearer": metric("baseline", "kl_to_teacher", 0.05),
    "distill: better": share_of("distill", "correct", 0.05, task=None),
}


def test_a_run_may_keep_all_claims() -> None:
    assert broken_claims(kept()) == set()


@pytest.mark.parametrize("start", BREAKS)
def test_each_claim_can_be_broken_by_itself(start: str) -> None:
    results = copy.deepcopy(kept())
    BREAKS[start](results)
    (name,) = broken_claims(results)
    assert name.startswith(start)


def test_every_claim_is_tried() -> None:
    tried = [[claim.name for claim in CLAIMS if claim.name.startswith(start)] for start in BREAKS]
    assert sorted(name for (name,) in tried) == sorted(claim.name for claim in CLAIMS)


def test_standard_errors_are_those_of_the_mean_over_problems() -> None:
    margin = at_least(0.95, "reason", level(1))(kept())
    assert margin.distance == pytest.approx(0.98 - 0.95)
    # The deviation of a sample of 98 ones and 2 zeros, over the root of their number.
    assert margin.standard_error == pytest.approx(math.sqrt(0.98 * 0.02 * 100 / 99 / 100))
    assert margin.sigmas == pytest.approx(margin.distance / margin.standard_error)
    same = of_sample([0.1, 0.1], ["a-1", "a-2"])
    assert same.sigmas is None, "nothing there that other problems would change"


def test_tellings_of_a_problem_are_no_other_problems() -> None:
    """Told four times and answered alike, 25 problems say no more than told once."""
    results = kept()
    told = [row for row in results.predictions["reason"] if row["level"] == 1]
    for place, row in enumerate(told):
        row["problem"] = f"l1-{place // 4:04d}"
        row["correct"] = place // 4 < 24
    margin = at_least(0.95, "reason", level(1))(results)
    assert margin.distance == pytest.approx(0.96 - 0.95)
    assert margin.standard_error == pytest.approx(math.sqrt(0.96 * 0.04 * 25 / 24 / 25))


def test_a_difference_is_taken_problem_by_problem() -> None:
    results = kept()
    # As many right, but others: the mean stays, its error does not.
    for row in results.predictions["dpo"]:
        if row["level"] == 1:
            row["correct"] = False
    for row in [row for row in results.predictions["dpo"] if row["level"] == 1][-10:]:
        row["correct"] = True
    margin = within(0.02, "dpo", "sft", level(1))(results)
    assert margin.distance == pytest.approx(0.02)
    assert margin.standard_error == pytest.approx(math.sqrt(0.2 * 100 / 99 / 100))


def test_runs_of_other_code_are_run_again_unless_they_are_kept() -> None:
    runs = [{"name": PLANS[0].name, "version": "now"}, {"name": PLANS[1].name, "version": "then"}]
    assert missing_plans(runs, "now", keep=False) == PLANS[1:]
    assert missing_plans(runs, "now", keep=True) == PLANS[2:]


@pytest.mark.parametrize("start", [None, "sft: .95 of"])
def test_a_run_is_recorded_and_its_clone_kept_if_it_breaks_a_claim(
    start: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, project = kept(), tmp_path / "clone"
    project.mkdir()
    if start:
        BREAKS[start](results)
    monkeypatch.setattr(claims, "RECORD", tmp_path / "claims.json")
    monkeypatch.setattr(claims, "prepare", lambda plan, version: project)
    monkeypatch.setattr(claims, "repro", lambda project, plan, side_by_side: 1.0)
    monkeypatch.setattr(claims, "git", lambda *arguments, folder: f"head of {folder.name}")
    monkeypatch.setattr(claims, "untouched", lambda project: True)
    monkeypatch.setattr(claims, "merged_equals_adapter", lambda project: True)
    monkeypatch.setattr(Results, "read", lambda project: results)
    claims.run_and_record(PLANS[0], "version", 1)
    (run,) = claims.read_record()
    assert run["commit"] == "head of clone", "the commit that was run, not one that came meanwhile"
    assert [name for name, held in run["claims"].items() if not held] == [
        claim.name for claim in CLAIMS if start and claim.name.startswith(start)
    ]
    assert project.exists() == (start is not None)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"runs": 5}', '{"runs": [{}]}'])
def test_a_broken_record_is_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "RECORD", tmp_path / "claims.json")
    (tmp_path / "claims.json").write_text(text)
    with pytest.raises(SystemExit, match=r"claims\.json is no record of runs; bring it back"):
        claims.main(show=True)
    assert (tmp_path / "claims.json").read_text() == text


def test_a_record_without_runs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "RECORD", tmp_path / "claims.json")
    claims.main(show=True)
    assert "has no runs" in capsys.readouterr().out


def test_the_plan_is_five_seeds_two_of_the_other_format_and_two_on_a_lesser_processor() -> None:
    assert len({plan.name for plan in PLANS}) == len(PLANS) == 9
    assert [plan.seed for plan in PLANS[:5]] == [1, 2, 3, 4, 5]
    assert sum(plan.dtype == "float32" for plan in PLANS) == 2
    assert sum(plan.lesser for plan in PLANS) == 2
