"""A dependency that is edited during a run: nothing is recorded, even if the edit is undone."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import minimind.mini_world.rows
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import Stopped, UserError
from minimind.lineage import edits
from minimind.lineage.code import write_code
from minimind.lineage.dvc_files import md5_of_file
from minimind.lineage.provenance import Provenance, unchanged
from minimind.lineage.records import Records
from minimind.lineage.resume import forget_recorded
from minimind.objectives.next_token import NextToken
from minimind.training.fit import FitConfig, fit
from stages import mini_world
from tests.graph import ROOT
from tests.shipped import shipped_params
from tests.test_fit import CONFIG, a_run, data, quiet_surroundings  # noqa: F401
from tests.tiny import tiny_model

CHANGED = "changed while the stage was running"


def edit_and_undo(path: Path) -> None:
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    path.write_bytes(before)


def change_section(path: Path) -> None:
    params = json.loads(path.read_text())
    params["sft"]["lr"] *= 2
    path.write_text(json.dumps(params))


@pytest.mark.parametrize("where", ["before the outputs", "while they are written"])
@pytest.mark.parametrize(
    ("file", "edit"), [("data/tokens.bin", edit_and_undo), ("params.yaml", change_section)]
)
def test_a_run_whose_dependency_was_edited_does_not_finish(
    tmp_path: Path,
    data,  # noqa: F811
    where: str,
    file: str,
    edit: Callable[[Path], None],
) -> None:
    metrics = tmp_path / "metrics.json"

    def edited_run() -> None:
        with a_run(tmp_path, FitConfig.model_validate(CONFIG)) as run:
            if where == "before the outputs":
                edit(tmp_path / file)
            with run.saving(metrics):
                metrics.write_text("{}")
                edit(tmp_path / file)

    with pytest.raises(UserError, match=CHANGED):
        edited_run()
    assert not list(tmp_path.glob(".resume/*/*/finished.json"))


@pytest.mark.parametrize("where", ["after the outputs", "when the states are closed"])
@pytest.mark.parametrize(
    ("file", "edit"), [("data/tokens.bin", edit_and_undo), ("params.yaml", change_section)]
)
def test_the_last_check_is_the_last_act(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    file: str,
    edit: Callable[[Path], None],
) -> None:
    """What was finished stays, for the same code to go on from; DVC records nothing."""
    monkeypatch.setenv("DVC_STAGE", "sft")
    metrics = tmp_path / "metrics.json"

    def edited_run() -> None:
        with a_run(tmp_path, FitConfig.model_validate(CONFIG)) as run:
            with run.saving(metrics):
                metrics.write_text("{}")
            if where == "after the outputs":
                edit(tmp_path / file)
            else:
                close = run.store.close
                monkeypatch.setattr(run.store, "close", lambda: (close(), edit(tmp_path / file)))

    with pytest.raises(UserError, match=CHANGED):
        edited_run()
    assert list(tmp_path.glob(".resume/*/*/finished.json"))
    assert not list(tmp_path.glob("runs/*"))


def test_a_signal_while_the_record_is_written_stops_in_good_order(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DVC_STAGE", "sft")
    metrics = tmp_path / "metrics.json"

    def stopped_run() -> None:
        with a_run(tmp_path, FitConfig.model_validate(CONFIG)) as run:
            with run.saving(metrics):
                metrics.write_text("{}")
            monkeypatch.setattr(run, "seal", lambda: signal.raise_signal(signal.SIGINT))

    with pytest.raises(Stopped, match="Run the same command again"):
        stopped_run()
    assert list(tmp_path.glob(".resume/*/*/finished.json"))


def test_no_checkpoint_is_left_of_a_run_whose_data_was_edited_and_put_back(
    tmp_path: Path,
    data: EncodedDataset,  # noqa: F811
) -> None:
    """Else the run, killed and resumed, would end with weights that saw other data."""
    config = FitConfig.model_validate(CONFIG)

    def run_to(step: int, edit_at: int) -> None:
        steps = 0
        with a_run(tmp_path, config) as run:

            def objective(model, batch, progress):  # type: ignore[no-untyped-def]
                nonlocal steps
                steps += model.training
                if model.training and steps == edit_at * config.accumulation_steps:
                    edit_and_undo(tmp_path / "data" / "tokens.bin")
                if model.training and steps == step * config.accumulation_steps:
                    signal.raise_signal(signal.SIGTERM)
                return NextToken()(model, batch, progress)

            fit(tiny_model(seed=2), objective, data, config, run)

    with pytest.raises(Stopped):
        run_to(5, edit_at=0)
    with pytest.raises(UserError, match=CHANGED):
        run_to(4, edit_at=2)
    (kept,) = tmp_path.glob(".resume/sft/*/checkpoint-*")  # that of before the edit
    assert kept.name == "checkpoint-000000005"
    assert not list(tmp_path.glob(".resume/sft/*/partial-*"))


def test_a_run_that_was_edited_while_its_record_was_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "../dvc.yaml:encode@sft")
    source = Path("source.jsonl")
    source.write_text("1")
    with unchanged("encode", Path("params.yaml"), {}, [source]):
        pass
    assert Path("runs/encode-sft.json").is_file()
    write = Records.write

    def write_and_edit(records: Records, stage: str, contents: dict[str, object]) -> Path:
        file = write(records, stage, contents)
        edit_and_undo(source)
        return file

    monkeypatch.setattr(Records, "write", write_and_edit)
    with (
        pytest.raises(UserError, match=CHANGED),
        unchanged("encode", Path("params.yaml"), {}, [source]),
    ):
        pass
    assert not list(Path("runs").iterdir())


def test_a_stage_of_another_graph_has_a_record_and_a_lock_of_its_own(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the sft in tools/: what DVC has recorded there needs no resume checkpoint any more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "tools/dvc.yaml:tool_sft")
    metrics = tmp_path / "metrics.json"
    with a_run(tmp_path, FitConfig.model_validate(CONFIG)) as run, run.saving(metrics):
        metrics.write_text("{}")
    assert [file.name for file in tmp_path.glob("runs/*")] == ["tool_sft.json"]
    (states,) = [marker.parent for marker in tmp_path.glob(".resume/*/*/finished.json")]
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/dvc.lock").write_text(md5_of_file(metrics))
    forget_recorded(tmp_path / ".resume", wanted=states)
    assert not states.exists()


def test_a_parameter_of_another_stage_may_be_edited(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DVC_STAGE", "sft")
    metrics = tmp_path / "metrics.json"
    with a_run(tmp_path, FitConfig.model_validate(CONFIG)) as run, run.saving(metrics):
        metrics.write_text("{}")
        params = json.loads((tmp_path / "params.yaml").read_text())
        (tmp_path / "params.yaml").write_text(json.dumps(params | {"dpo": {}}))
    assert list(tmp_path.glob(".resume/*/*/finished.json"))


def test_a_stages_code_is_loaded_when_it_starts() -> None:
    """What is edited later does not run, not even by an import inside a function."""
    code = "import sys; from minimind.lineage.provenance import loaded_code; "
    code += "print(sorted({*loaded_code('sft')} - {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['stages.sft']\n"


def test_dvc_must_record_the_code_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_code(Path("code"), ["encode"])
    Provenance("encode", [], Path(), {}, by_dvc=True).check()
    file = Path("code/encode.json")
    file.write_text(file.read_text().replace("minimind.files", "minimind.filed"))
    with pytest.raises(UserError, match=r"code/encode.json is not of the code that is here"):
        Provenance("encode", [], Path(), {}, by_dvc=True)
    Provenance("encode", [], Path(), {})


def test_a_short_stage_notices_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = shipped_params()
    params["mini_world"] |= {name: 2 for name in params["mini_world"] if name.startswith("num_")}
    params["mini_world"]["num_eval_per_level"] = [2, 2, 2, 2]
    Path("params.yaml").write_text(yaml.safe_dump(params))

    def write(output: Path, config: minimind.mini_world.rows.MiniWorldConfig) -> dict[str, int]:
        params["seed"] += 1
        Path("params.yaml").write_text(yaml.safe_dump(params))
        return {}

    monkeypatch.setattr(mini_world, "write_mini_world", write)
    result = CliRunner().invoke(mini_world.app, ["--output", "out", "--metrics", "metrics.json"])
    assert result.exit_code == 1
    assert CHANGED in result.stderr


def test_code_that_is_edited_while_it_is_imported_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edits, "_at_start", {})
    edits.note_code()
    Provenance("sft", [], Path(), {})
    edited = ROOT / "minimind/training/fit.py"
    size, inode, changed = edits._at_start[edited]
    edits._at_start[edited] = (size, inode, changed - 1)  # as if it was older when imports began
    with pytest.raises(UserError, match=r"fit\.py changed while the stage was starting"):
        Provenance("sft", [], Path(), {})
    Provenance("encode", [], Path(), {})  # which does not use it
