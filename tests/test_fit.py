"""The training loop as a whole: it learns, resumes with the same bytes, and stops in time."""

import json
import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import Stopped, UserError
from minimind.model.transformer import Transformer
from minimind.objectives.next_token import NextToken
from minimind.terminal.signals import NAMES
from minimind.training.bits import bits_per_byte
from minimind.training.fit import FitConfig, fit, split, summary
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.run import Run, start_run
from minimind.training.session import Generators, History
from tests.tiny import random_rows, tiny_model, tiny_tokenizer, write_rows

CONFIG = {
    "optimizer": "adamw",
    "lr": 0.01,
    "weight_decay": 0.01,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "dtype": "float32",
    "seed": 1,
    "epochs": 5.0,
    "max_steps": 20,
    "batch_size": 4,
    "accumulation_steps": 2,
    "schedule": "cosine",
    "warmup_steps": 3,
    "validation_share": 0.2,
    "eval_interval": 5,
    "patience": 0,
    "min_delta": 0.0,
    "log_interval": 2,
    "gradient_checkpointing": False,
}


@pytest.fixture
def data(tmp_path: Path) -> EncodedDataset:
    return write_rows(tmp_path / "data", random_rows(50))


@contextmanager
def a_run(tmp_path: Path, config: FitConfig) -> Iterator[Run]:
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"sft": config.model_dump()}))
    with start_run("sft", params, {"sft": config}, [tmp_path / "data"]) as run:
        yield run


@pytest.fixture(autouse=True)
def quiet_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("MINIMIND_SAVE_SECONDS", "3600")
    torch.set_num_threads(1)


def train(
    tmp_path: Path,
    data: EncodedDataset,
    stop_after: int = 0,
    stop_signal: int = signal.SIGTERM,
    **changes: object,
) -> tuple[History, Transformer]:
    """A run from the newest checkpoint on; a signal comes after `stop_after` steps, if not 0."""
    config = FitConfig.model_validate(CONFIG | changes)
    model = tiny_model(seed=2)
    steps_seen = 0
    with a_run(tmp_path, config) as run:

        def objective(model: torch.nn.Module, batch, progress: float):  # type: ignore[no-untyped-def]
            nonlocal steps_seen
            steps_seen += model.training
            if model.training and steps_seen == stop_after * config.accumulation_steps:
                signal.raise_signal(stop_signal)
            return NextToken(10.0, 5.0)(model, batch, progress)

        history = fit(model, objective, data, config, run)
    return history, model


def weights(model: Transformer) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"dtype": "float16"}])
@pytest.mark.parametrize("stop_after", [1, 7, 13])
def test_a_stopped_run_ends_with_the_same_bytes(
    tmp_path: Path, data: EncodedDataset, changes: dict[str, object], stop_after: int
) -> None:
    whole, whole_model = train(tmp_path, data, **changes)
    with pytest.raises(Stopped, match=f"at step {stop_after} of 20") as stopped:
        train(tmp_path, data, stop_after=stop_after, **changes)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    resumed, resumed_model = train(tmp_path, data, **changes)
    assert resumed.resumes == 1
    assert weights(resumed_model) == weights(whole_model)
    assert resumed.rows == whole.rows


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"validation_share": 0.01}, "validation_share 0.01 of 50 source rows holds none out"),
        ({"patience": 4}, "before the last of 20 steps there are 3 validations"),
        ({"min_delta": 0.5}, "min_delta is 0.5, but patience is 0"),
        ({"patience": 3, "min_delta": 0.5}, None),
        ({"validation_share": 0.02}, None),
        ({"validation_share": 0.0}, None),
    ],
)
def test_settings_of_validation_that_do_nothing_are_said(
    tmp_path: Path,
    data: EncodedDataset,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    said: str | None,
) -> None:
    train(tmp_path, data, **changes)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if re.search("none out|nothing", line)
    ]
    assert [said in line for line in lines] == [True] if said else lines == []


@pytest.mark.parametrize("name", NAMES)
def test_every_signal_that_ends_a_run_leaves_a_checkpoint(
    tmp_path: Path, data: EncodedDataset, name: str
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="at step 7 of 20") as stopped:
        train(tmp_path, data, stop_after=7, stop_signal=number)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    resumed, _ = train(tmp_path, data)
    assert resumed.resumes == 1


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(
    tmp_path: Path, data: EncodedDataset
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        history, _ = train(tmp_path, data, stop_after=7, stop_signal=signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (history.step, history.resumes) == (20, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_whose_gradient_overflows_in_float16_is_skipped_and_counted(
    tmp_path: Path, data: EncodedDataset, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.training.optimizer.FIRST_SCALE", 2.0**36)
    changes = {"dtype": "float16", "optimizer": optimizer, "validation_share": 0.0}
    history, model = train(tmp_path, data, max_steps=2, **changes)
    assert history.skipped_steps == 2
    assert [row["skipped_steps"] for row in history.rows] == [2]
    assert "grad_norm" not in history.rows[-1]  # of no step
    assert weights(model) == weights(tiny_model(seed=2))  # neither optimizer has moved
    history, _ = train(tmp_path, data, max_steps=40, epochs=9.0, log_interval=10, **changes)
    assert 2 < history.skipped_steps < 38
    assert math.isfinite(history.rows[-1]["grad_norm"])
    assert summary(history)["skipped_steps"] == history.skipped_steps
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]


def test_one_optimizer_overflowing_keeps_the_other_from_its_step() -> None:
    model = tiny_model(seed=2)
    optimizer = Optimizer(model, OptimizerConfig(dtype="float16"), torch.device("cpu"))
    before = weights(model)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, math.inf if "norm" in name else 1.0)
    optimizer.scaler.scale(torch.ones(()))  # as backward does
    assert not math.isfinite(optimizer.step(1.0))
    assert weights(model) == before


def test_a_warm_up_longer_than_the_training_is_said(
    tmp_path: Path, data: EncodedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    history, _ = train(tmp_path, data, warmup_steps=20, log_interval=1)
    assert history.rows[-1]["lr"] == 0.01  # in the last step, but reached
    assert "warmup" not in capsys.readouterr().err
    train(tmp_path, data, warmup_steps=1000)
    said = capsys.readouterr().err
    assert "warmup_steps is 1000 of only 20 optimizer steps" in said
    assert "with warmup_steps 2 it would" in said


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_resumed_run_draws_on_as_it_would_have_on_every_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"state": torch.arange(16, dtype=torch.uint8)}  # stands for a generator that is absent
    module = getattr(torch, device)
    monkeypatch.setattr(module, "get_rng_state", lambda: there["state"])
    monkeypatch.setattr(module, "set_rng_state", lambda state: there.update(state=state))
    generators = Generators(replace(Run.alone(), device=torch.device(device)))
    saved, expected = generators.state_tensors(), torch.rand(3)
    there["state"] = torch.zeros(16, dtype=torch.uint8)
    generators.load_state_tensors(saved)
    assert there["state"].tolist() == list(range(16))
    assert torch.equal(torch.rand(3), expected)


def test_rows_longer_than_the_models_positions_are_one_line(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", [*random_rows(20), ([5] * 150, [0] + [1] * 149)])
    with pytest.raises(UserError, match=r"has a row of \d+ tokens.*max_positions 128.*at most 128"):
        train(tmp_path, data)


def test_states_of_other_parameters_are_not_picked_up(tmp_path: Path, data: EncodedDataset) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, data, stop_after=5)
    other, _ = train(tmp_path, data, lr=0.02)
    assert other.resumes == 0
    same, _ = train(tmp_path, data)
    assert same.resumes == 1


def test_a_damaged_state_falls_back_to_the_one_before(
    tmp_path: Path, data: EncodedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    _, whole_model = train(tmp_path, data)
    for stop_after in (4, 3):  # states at steps 4 and 7
        with pytest.raises(Stopped):
            train(tmp_path, data, stop_after=stop_after)
    newest = max((tmp_path / ".resume").glob("*/*/checkpoint-*"))
    tensors = newest / "tensors.safetensors"
    damaged = bytearray(tensors.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    tensors.write_bytes(damaged)
    _, model = train(tmp_path, data)
    said = capsys.readouterr().err
    assert "checkpoint-000000007 is damaged" in said
    assert "going on from step 4" in said
    assert weights(model) == weights(whole_model)


def test_the_golden_history(tmp_path: Path, data: EncodedDataset) -> None:
    """A refactoring leaves these numbers as they are."""
    history, _ = train(tmp_path, data)
    losses = [row["loss"] for row in history.rows if "loss" in row]
    assert losses == pytest.approx(GOLDEN, rel=1e-5)


GOLDEN = [
    15.00865,
    18.2303,
    12.03849,
    14.68293,
    11.76593,
    11.54358,
    10.49124,
    9.834118,
    7.635044,
    9.298894,
]


def test_the_loss_falls_and_validation_is_reported(tmp_path: Path, data: EncodedDataset) -> None:
    history, _ = train(tmp_path, data, validation_share=0.1, max_steps=60, epochs=20)
    losses = [row["loss"] for row in history.rows if "loss" in row]
    assert losses[-1] < losses[0] / 2
    assert history.rows[0].keys() == {"step", "val_loss", "val_nll"}
    evaluated = [row["step"] for row in history.rows if "val_loss" in row]
    assert evaluated[0] == 0 and evaluated[-1] == 60
    assert history.rows[0]["val_nll"] == pytest.approx(math.log(97), rel=0.02)
    values = summary(history)
    assert values["initial_val_loss"] == history.rows[0]["val_loss"] != values["val_loss"]
    unvalidated, _ = train(tmp_path, data, validation_share=0.0)
    assert not {"val_loss", "initial_val_loss"} & set(summary(unvalidated))


def test_accumulation_changes_nothing_but_memory(tmp_path: Path, data: EncodedDataset) -> None:
    one, _ = train(tmp_path, data, batch_size=8, accumulation_steps=1)
    four, _ = train(tmp_path, data, batch_size=2, accumulation_steps=4)
    for a, b in zip(one.rows, four.rows, strict=True):
        assert a == pytest.approx(b, rel=2e-4)


def test_early_stopping_keeps_the_best_weights(tmp_path: Path, data: EncodedDataset) -> None:
    changes = {"lr": 0.05, "schedule": "constant", "patience": 2, "eval_interval": 4}
    changes |= {"max_steps": 200, "epochs": 100}
    history, _ = train(tmp_path, data, **changes)
    assert history.step < 200
    validations = [row["val_loss"] for row in history.rows if "val_loss" in row]
    assert history.best_loss <= min(validations) + 1e-12
    assert history.validation["loss"] == pytest.approx(history.best_loss, rel=1e-6)
    assert history.best_step < history.step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions_are_honoured(tmp_path: Path, data: EncodedDataset, dtype: str) -> None:
    full, _ = train(tmp_path, data)
    half, _ = train(tmp_path, data, dtype=dtype)
    losses = [[r["loss"] for r in h.rows if "loss" in r] for h in (full, half)]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05)


def test_a_loss_that_is_not_finite_names_step_rows_and_rate(
    tmp_path: Path, data: EncodedDataset
) -> None:
    with pytest.raises(UserError, match=r"nan|inf") as error:
        train(tmp_path, data, lr=1e30, grad_clip=1e30, warmup_steps=0)
    assert "learning rate" in str(error.value)
    assert "on rows" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_the_last_step_threw_away_are_not_kept(
    tmp_path: Path, data: EncodedDataset
) -> None:
    """The loss before that step was fine, and after it none is computed."""
    changes = {"optimizer": "adamw", "lr": 1e38, "max_steps": 1, "validation_share": 0.0}
    with pytest.raises(UserError, match="is not finite after step 1; lower lr"):
        train(tmp_path, data, warmup_steps=0, patience=0, weight_decay=1e30, **changes)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_more_steps_than_the_epochs_have_are_said(
    tmp_path: Path, data: EncodedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    history, _ = train(tmp_path, data, max_steps=0, epochs=1.0)
    train(tmp_path, data, max_steps=history.step, epochs=1.0)
    assert "max_steps" not in capsys.readouterr().err
    train(tmp_path, data, max_steps=history.step + 1, epochs=1.0)
    said = f"max_steps is {history.step + 1}, but 1 epochs have {history.step}; raise epochs"
    assert said in capsys.readouterr().err


def test_too_little_data_is_said(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "data", random_rows(1))
    with pytest.raises(UserError, match="holds none out"):
        train(tmp_path, one, patience=1)


TEXTS = ["小明有15个苹果。" * 4, "Tom has 3 apples.", "一", "a", "2+3=5"] * 3


def test_bits_per_byte_are_of_what_the_trained_tokens_spell(tmp_path: Path) -> None:
    """Of documents in pieces, cut inside characters, and of chats with tags and control tokens."""
    tokenizer = ChatTokenizer.load(tiny_tokenizer(tmp_path / "tokenizer"))
    rows, sources = [], [0]
    for text in TEXTS:
        ids, loss_mask = tokenizer.encode_document(text)
        pieces = [slice(start, start + 10) for start in range(0, len(ids), 10)]
        # The first token of a piece is nothing to predict, so it is that of the one before.
        rows += [([1, *ids[p]], [0, *loss_mask[p]]) for p in pieces]
        sources.append(len(rows))
    assert any("\ufffd" in tokenizer.decode(ids) for ids, _ in rows)
    documents = write_rows(tmp_path / "documents", rows, "text", sources=sources)
    replies = [f"<think>{text}</think>\n<answer>{text}</answer>" for text in TEXTS]
    chats = [
        [{"role": role, "content": text} for role, text in (("user", "?"), ("assistant", reply))]
        for reply in replies
    ]
    dataset = write_rows(tmp_path / "chats", [tokenizer.encode_chat(chat) for chat in chats])
    config = FitConfig.model_validate(CONFIG | {"validation_share": 0.5})
    for data, spelt in ((documents, TEXTS), (dataset, replies)):
        _, held_out = split(data, config)
        owners = sorted({int(np.searchsorted(data.sources, s, "right")) - 1 for s in held_out})
        assert len(owners) == len(TEXTS) // 2
        num_bytes = sum(len(spelt[owner].encode()) for owner in owners)
        num_tokens = sum(int((data.row(s)[1] > 0).sum()) for s in held_out)
        expected = pytest.approx({"bits_per_byte": 1.5 * num_tokens / math.log(2) / num_bytes})
        for name in ("nll", "ce"):  # of next-token stages and of distillation
            history = History(validation={"loss": 9.0, name: 1.5})
            assert bits_per_byte(history, data, config, tokenizer) == expected


def test_no_bits_per_byte_where_nothing_is_held_out_or_spelt(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_tokenizer(tmp_path / "tokenizer"))
    silent = write_rows(tmp_path / "data", [([1, 2], [0, 1])] * 4)
    assert tokenizer.decode([2]) == ""
    config = FitConfig.model_validate(CONFIG | {"validation_share": 0.5})
    assert bits_per_byte(History(validation={"nll": 1.0}), silent, config, tokenizer) == {}
    assert bits_per_byte(History(), silent, config, tokenizer) == {}
    assert bits_per_byte(History(validation={"accuracy": 1.0}), silent, config, tokenizer) == {}
