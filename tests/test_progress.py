"""What is shown while a stage trains: an estimate that does not jump, plain lines, a bar."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.errors import Stopped
from minimind.terminal.progress import Progress, TimeLeft
from minimind.training.fit import FitConfig, fit
from tests.test_fit import (  # noqa: F401
    CONFIG,
    NextToken,
    a_run,
    data,
    quiet_surroundings,
    tiny_model,
    train,
)

PARTS = st.lists(st.integers(1, 5000), min_size=3, max_size=200)
SPEED = st.floats(1e-6, 1e3)  # seconds per unit of work


def estimates(parts: list[int], seconds: list[float]) -> list[float | None]:
    time_left, shown = TimeLeft(sum(parts), len(parts)), []
    for work, taken in zip(parts, seconds, strict=True):
        time_left.update(work, taken)
        shown.append(time_left.seconds)
    return shown


@given(PARTS, SPEED, st.floats(1, 1000))
def test_at_constant_speed_the_estimate_is_exact_however_slow_the_first_step_was(
    parts: list[int], speed: float, slowness: float
) -> None:
    seconds = [speed * work for work in parts]
    shown = estimates(parts, [slowness * seconds[0], *seconds[1:]])
    assert shown[0] is None
    assert shown[1:] == pytest.approx(
        [speed * sum(parts[done:]) for done in range(2, len(parts) + 1)], abs=0, rel=1e-9
    )
    assert all(later < earlier for earlier, later in pairwise(shown[1:]))


@given(st.integers(3, 400), SPEED, st.floats(1, 1000), st.data())
def test_one_slow_step_moves_the_estimate_by_no_more_than_is_said(
    num_parts: int, speed: float, slowness: float, draw: st.DataObject
) -> None:
    slow = draw.draw(st.integers(1, num_parts - 2))  # the last one leaves 0
    seconds = [speed] * num_parts
    seconds[slow] *= slowness
    shown = estimates([1] * num_parts, seconds)
    exact = speed * (num_parts - slow - 1)
    most = 1 + (slowness - 1) * max(1 / slow, 1 / max(10, num_parts / 10))
    estimate = shown[slow]
    assert estimate is not None
    assert exact * (1 - 1e-9) <= estimate <= exact * most * (1 + 1e-9)


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("grpo", 3, 0, None, log_seconds=0, silent=False) as progress:
        for done in range(1, 4):
            values = {"loss": 0.5, "reward": 0.25, "completion_length": 41.2, "lr": 5e-4, "kl": 1}
            progress.update(done, values | ({"val_loss": 2.0} if done == 2 else {}), 1000)
    shown = re.sub(r"[\d,]+ tok/s", "9 tok/s", capsys.readouterr().err)
    assert shown.splitlines() == [
        "grpo: step 1/3  loss 0.500  reward 0.250  length 41  lr 0.0005  9 tok/s",
        "grpo: step 2/3  loss 0.500  val 2.000  reward 0.250  length 41  lr 0.0005  9 tok/s  "
        "0:00 left",
        "grpo: step 3/3  loss 0.500  val 2.000  reward 0.250  length 41  lr 0.0005  9 tok/s  "
        "0:00 left",
    ]


STEPS = """
import sys
from minimind.terminal.progress import Progress
with Progress("sft", 3, 0, 300, 3600, silent=False) as progress:
    for done in (1, 2, 3):
        progress.update(done, {"loss": 1.0}, 100)
        print("something is said", file=sys.stderr)
        if done == 3 and sys.argv[1:]:
            raise KeyboardInterrupt
"""


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a terminal is sent while some steps are made."""
    ours, theirs = os.openpty()
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", STEPS, *arguments],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    ) as process:
        os.close(theirs)
        sent = b""
        try:
            while part := os.read(ours, 4096):
                sent += part
        except OSError:  # how Linux says that the other side is closed
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(ours)
    return sent.decode()


COLOUR = re.compile(r"\x1b\[[\d;]*3\d[\d;]*m")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
@pytest.mark.parametrize("stopped", [(), ("stopped",)])
def test_a_terminal_has_a_bar_with_lines_above_it_and_its_cursor_back(
    stopped: tuple[str, ...],
) -> None:
    sent = on_a_terminal(*stopped)
    assert "3/3 loss 1.000" in re.sub(r"\x1b\[[\d;]*m", "", sent)
    assert sent.count("something is said\r\n") == 3
    assert COLOUR.search(sent)
    assert sent.rfind("\x1b[?25h") > sent.rfind("\x1b[?25l")
    assert ("KeyboardInterrupt" in sent) == bool(stopped)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_no_color_is_heard_and_a_dumb_terminal_gets_lines() -> None:
    assert not COLOUR.search(on_a_terminal(NO_COLOR="1"))
    assert "sft: step 3/3  loss 1.000" in on_a_terminal(TERM="dumb")


@pytest.mark.parametrize("changes", [{"max_steps": 0, "epochs": 2.6}, {"max_steps": 13}])
def test_the_header_says_what_will_be_trained_and_how_long_it_took(
    tmp_path: Path,
    data,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, float],
) -> None:
    config = FitConfig.model_validate(CONFIG | changes)
    headers = []
    for _ in range(2):
        model = tiny_model()
        with a_run(tmp_path, config) as run:
            history = fit(model, NextToken(), data, config, run)
        headers.append(capsys.readouterr().err.splitlines()[0])
        record = {**run.record, **run.computed_with(), "training_seconds": 3700}
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / "sft.json").write_text(json.dumps(record))
    assert headers[0] == (
        f"sft: seed 1, {model.num_parameters:,} parameters, {history.step} steps, "
        f"{history.tokens:,} tokens, float32 on cpu"
    )
    assert headers[1] == f"{headers[0]}, about 1:01:40, as the last time"


def test_a_run_that_goes_on_counts_the_tokens_that_are_left(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MINIMIND_LOG_SECONDS", "0")
    with pytest.raises(Stopped):
        train(tmp_path, data, stop_after=7)
    train(tmp_path, data)
    said = capsys.readouterr().err.splitlines()
    assert sum("sft: step " in line for line in said) == 7 + 13
    assert re.search(r"step 20/20 .* 0:00 left$", said[-1])
