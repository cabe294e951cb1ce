"""The record of whole runs, and what the README shows of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minimind.cli.table import RECORD, readme_table
from tests.graph import ROOT

COMMAND = "python -m minimind.cli.table --record"  # stands above the table in both READMEs
TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "seed": (int,),
    "dtype": (str,),
    "isa": (str,),
    "problems": (str,),
    "minutes": (int, float),
    "commit": (str,),
    "processor": (str,),
    "claims": (dict,),
    "metrics": (dict,),
}


def read_runs() -> list[dict[str, Any]]:
    return json.loads((ROOT / RECORD).read_text(encoding="utf-8"))["runs"]


def faults(runs: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a record; while it is being made, runs may be missing."""
    found = []
    for number, run in enumerate(runs):
        name = f"run {run.get('name', number)}"
        found += [
            f"{name}: {key} is {run.get(key)!r}"
            for key, types in TYPES.items()
            if type(run.get(key)) not in types or run[key] in ("", {})
        ]
        if not re.fullmatch(r"[0-9a-f]{40}", str(run.get("commit"))):
            found.append(f"{name}: {run.get('commit')!r} is no commit")
        claims = run.get("claims") or {}
        found += [f"{name}: broken: {claim}" for claim, holds in claims.items() if not holds]
    if len({run.get("name") for run in runs}) < len(runs):
        found.append("two runs have the same name")
    if len({tuple(run.get("claims") or {}) for run in runs}) > 1:
        found.append("runs were held against different claims")
    return found + (too_few(runs) if len(runs) >= 9 else [])


def too_few(runs: list[dict[str, Any]]) -> list[str]:
    """Whether a whole record has five seeds alike, and two of another dtype and processor each."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for run in runs:
        seeds.setdefault((run["dtype"], run["isa"]), set()).add(run["seed"])
    dtype, isa = max(seeds, key=lambda group: len(seeds[group]))
    others = {
        "another dtype": [len(s) for (d, i), s in seeds.items() if d != dtype and i == isa],
        "another processor": [len(s) for (d, i), s in seeds.items() if d == dtype and i != isa],
    }
    found = [] if len(seeds[dtype, isa]) >= 5 else [f"fewer than 5 seeds of {dtype} on {isa}"]
    return found + [
        f"fewer than 2 seeds of {what}" for what, n in others.items() if max(n, default=0) < 2
    ]


def shown_in(readme: str) -> str:
    """What stands below the line with the command, up to an empty line."""
    _, found, rest = readme.partition(f"<!-- printed by: {COMMAND} -->\n")
    assert found, f"no comment names the command {COMMAND}"
    return rest.split("\n\n")[0]


def test_the_record_is_whole_and_every_claim_holds() -> None:
    assert not faults(read_runs())


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readmes_table_is_that_of_the_record(name: str) -> None:
    shown = shown_in((ROOT / name).read_text(encoding="utf-8"))
    if read_runs():
        assert shown == readme_table(ROOT / RECORD, ROOT / "dvc.yaml")
    else:
        assert "|" not in shown, "numbers that are of no recorded run"


# ---- that these checks can fail ----


def run(seed: int, dtype: str = "bfloat16", isa: str = "AVX512", **changes: Any) -> dict[str, Any]:
    metrics = {
        "training": {"sft": {"bits_per_byte": 0.5 + seed / 100}},
        "evaluation": {"sft": {"exact_l1": seed / 10}},
    }
    return {
        "name": f"{seed}-{dtype}-{isa}",
        "seed": seed,
        "dtype": dtype,
        "isa": isa,
        "problems": "0123456789abcdef",
        "minutes": 18.5,
        "commit": "0123456789abcdef" * 2 + "01234567",
        "processor": "a processor",
        "claims": {"sft: it learns": True, "dpo: it prefers": True},
        "metrics": metrics,
    } | changes


ALIKE = [run(seed) for seed in (1, 2, 3, 4, 5)]
WHOLE = [*ALIKE, *(run(s, "float32") for s in (1, 2)), *(run(s, isa="AVX2") for s in (1, 2))]


def test_a_whole_record_and_one_in_the_making_have_no_faults() -> None:
    assert not faults(WHOLE)
    assert not any(faults(WHOLE[:number]) for number in range(9))


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        *(([run(1) | {key: None}], f": {key} is None") for key in TYPES),
        ([{}], "run 0: seed is None"),
        ([run(1, processor="")], "processor is ''"),
        ([run(1) | {"seed": "1"}], "seed is '1'"),
        ([run(1, commit="HEAD")], "'HEAD' is no commit"),
        ([run(1, claims={"sft: it learns": False})], "broken: sft: it learns"),
        ([run(1), run(1)], "the same name"),
        ([run(1), run(2, claims={"sft: it learns": True})], "different claims"),
        ([*WHOLE[:4], run(6, "float16"), *WHOLE[5:]], "fewer than 5 seeds of bfloat16 on AVX512"),
        ([*WHOLE[:6], run(6), *WHOLE[7:]], "fewer than 2 seeds of another dtype"),
        ([*WHOLE[:8], run(6)], "fewer than 2 seeds of another processor"),
    ],
)
def test_every_fault_is_found(runs: list[dict[str, Any]], said: str) -> None:
    assert any(said in fault for fault in faults(runs)), faults(runs)


def test_a_table_that_is_not_the_records_is_found(tmp_path: Path) -> None:
    record = tmp_path / "claims.json"
    record.write_text(json.dumps({"runs": WHOLE}))
    printed = readme_table(record, ROOT / "dvc.yaml")
    readme = f"# Title\n\n<!-- printed by: {COMMAND} -->\n{printed}\n\nMean and so on.\n"
    assert shown_in(readme) == printed
    assert " 30 10–50 |" in printed and printed.startswith("| 5 seeds ")
    record.write_text(json.dumps({"runs": [*WHOLE[:4], run(5, metrics=run(9)["metrics"])]}))
    assert shown_in(readme) != readme_table(record, ROOT / "dvc.yaml")
    with pytest.raises(AssertionError, match="no comment names"):
        shown_in("# Title\n")
