"""Sections of params.yaml, and what they share."""

import json
from pathlib import Path
from typing import Any

import pytest

import minimind.params
import tests.shipped
from minimind.compute.precision import DType
from minimind.errors import UserError
from minimind.lineage.provenance import Provenance, unchanged
from minimind.params import Section, Seed, load_section


class Both(Section):
    lr: float
    seed: Seed
    dtype: DType


class Neither(Section):
    lr: float


def write(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps({"seed": 1, "dtype": "float32", "a": {"lr": 0.1}} | values))
    return path


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(Path("params.yaml"))


def test_a_section_without_a_seed_has_that_of_the_top_level(params: Path) -> None:
    assert load_section(params, "a", Both) == Both(lr=0.1, seed=1, dtype="float32")
    write(params, seed=2)
    assert load_section(params, "a", Both) == Both(lr=0.1, seed=2, dtype="float32")
    assert load_section(params, "a", Neither) == Neither(lr=0.1)


def test_its_own_wins_and_null_is_none(params: Path) -> None:
    write(params, a={"lr": 0.1, "seed": 0, "dtype": None})
    assert load_section(params, "a", Both) == Both(lr=0.1, seed=0, dtype="float32")
    write(params, b={"a": {"lr": 0.1, "dtype": "bfloat16"}})
    assert load_section(params, "b.a", Both) == Both(lr=0.1, seed=1, dtype="bfloat16")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seed": -1}, "params.yaml: seed is -1; it should be"),
        ({"dtype": None}, "params.yaml: dtype is None; it should be"),
        ({"a": {"lr": 0.1, "seed": -1}}, "params.yaml: a.seed is -1; it should be"),
        ({"a": {"lr": 0.1, "seed": [1]}, "dtype": 3}, "a.seed is [1]; .*; dtype is 3; "),
    ],
)
def test_a_complaint_names_the_key_that_is_wrong(
    params: Path, values: dict[str, Any], said: str
) -> None:
    write(params, **values)
    with pytest.raises(UserError, match=said.replace("[", r"\[").replace("]", r"\]")):
        load_section(params, "a", Both)


def test_a_key_that_stands_nowhere_is_missing(params: Path) -> None:
    params.write_text(json.dumps({"dtype": "float32", "a": {"lr": 0.1, "seed": None}}))
    with pytest.raises(UserError, match=r"params.yaml: seed is missing; add it"):
        load_section(params, "a", Both)


def test_a_change_of_a_shared_key_is_noticed_where_it_is_used(params: Path) -> None:
    used = {"a": load_section(params, "a", Both)}
    unused = {"a": load_section(params, "a", Neither)}
    write(params, seed=2)
    with pytest.raises(UserError, match=r"params.yaml: a changed while the stage was running"):
        Provenance("sft", [], params, used).check()
    Provenance("sft", [], params, unused).check()


def test_a_record_has_the_shared_keys_that_are_used(
    params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC has them in its lock, with which the record is compared."""
    monkeypatch.setenv("DVC_STAGE", "a")
    for section, expected in ((Both, {"a", "seed", "dtype"}), (Neither, {"a"})):
        with unchanged("sft", params, {"a": load_section(params, "a", section)}, []):
            pass
        record = json.loads(Path("runs/a.json").read_text())
        assert record["params"]["params.yaml"].keys() == expected
    write(params, a={"lr": 0.1, "seed": 5})  # whose own one DVC tracks with its section
    with unchanged("sft", params, {"a": load_section(params, "a", Both)}, []):
        pass
    tree = json.loads(Path("runs/a.json").read_text())["params"]["params.yaml"]
    assert (tree["a"]["seed"], tree["seed"]) == ("5", "1")


def test_the_tests_know_which_keys_are_shared() -> None:
    assert minimind.params.SHARED == tests.shipped.SHARED


@pytest.mark.parametrize("value", [True, "yes please", "1_000", " 5", "nan", "0x10", [1.0]])
def test_what_is_no_number_is_not_taken_for_one(params: Path, value: object) -> None:
    write(params, seed=1, dtype="float32", a={"lr": value})
    with pytest.raises(UserError, match=r"a\.lr"):
        load_section(params, "a", Both)


@pytest.mark.parametrize("value", [1e300, "-1e300", 1e-300, 1e39, [1.0, 1e300]])
def test_what_float32_has_not_is_refused(params: Path, value: object) -> None:
    """Later it would be a traceback: PyTorch cannot convert it, or takes it for 0."""
    write(params, seed=1, dtype="float32", a={"lr": value})
    with pytest.raises(UserError, match=r"a\.lr"):
        load_section(params, "a", Both)


@pytest.mark.parametrize("content", ["- grpo", "", "grpo"])
def test_a_file_without_sections_is_said_to_be_so(params: Path, content: str) -> None:
    params.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="it must be sections with keys, as `a:`"):
        load_section(params, "a", Both)


@pytest.mark.parametrize("value", ["5e-4", "1e-06", ".5", "3", 3, 0.5])
def test_numbers_may_be_written_as_texts(params: Path, value: object) -> None:
    """PyYAML reads some floats as texts, which DVC takes for numbers."""
    write(params, seed=1, dtype="float32", a={"lr": value})
    assert load_section(params, "a", Both).lr == float(str(value))
