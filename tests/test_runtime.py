"""How things are computed changes no result, and what is asked for wrongly is said in one line."""

from pathlib import Path

import pytest
import torch

from minimind.compute import compiling
from minimind.compute.compiling import can_compile
from minimind.compute.settings import RuntimeSettings, load_settings
from minimind.errors import UserError
from tests.test_fit import data, quiet_surroundings, train  # noqa: F401


def losses(history) -> list[float]:
    return [row["loss"] for row in history.rows if "loss" in row]


@pytest.mark.skipif(not can_compile(), reason="PyTorch's path has spaces")
def test_compiled_training_has_the_losses_of_eager_training(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"max_steps": 6, "log_interval": 1}
    eager, _ = train(tmp_path, data, **changes)
    monkeypatch.setenv("MINIMIND_COMPILE", "1")
    compiled, _ = train(tmp_path, data, **changes)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


def test_gradient_checkpointing_leaves_the_history_as_it_is(tmp_path: Path, data) -> None:  # noqa: F811
    plain, _ = train(tmp_path, data)
    recomputed, _ = train(tmp_path, data, gradient_checkpointing=True)
    assert recomputed.rows == plain.rows


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MINIMIND_DEVICE", "gpu", "MINIMIND_DEVICE is 'gpu'.*'cuda'"),
        ("MINIMIND_THREADS", "-1", "MINIMIND_THREADS is '-1'"),
        ("MINIMIND_COMPILE", "perhaps", "MINIMIND_COMPILE is 'perhaps'"),
        ("MINIMIND_SAVE_SECONDS", "soon", "MINIMIND_SAVE_SECONDS is 'soon'"),
        ("MINIMIND_TRACKER", "wandb, comet", "MINIMIND_TRACKER is 'comet'.*'trackio'"),
        ("MINIMIND_WANDB", "offline", "set MINIMIND_TRACKER=wandb; WANDB_MODE"),
        ("MINIMIND_WANDB_PROJECT", "mine", "set MINIMIND_TRACKER_PROJECT"),
    ],
)
def test_a_wrong_setting_is_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message) as error:
        load_settings()
    assert "\n" not in str(error.value)


def test_where_the_compiler_cannot_find_pytorch_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", "/a folder/torch/__init__.py")
    with pytest.raises(UserError, match="a path with spaces; set it to false"):
        compiling.compiled(torch.nn.Linear(1, 1), RuntimeSettings(compile=True))
