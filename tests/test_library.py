"""The library by itself: no graph, no params.yaml, no folder layout."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minimind
from minimind import (
    ChatTokenizer,
    EncodedDataset,
    FitConfig,
    Loss,
    NextToken,
    UserError,
    evaluate,
    fit,
    load_model,
    read_problems,
    reply,
    save_checkpoint,
    save_tokenizer,
    train_tokenizer,
)
from tests.graph import ROOT
from tests.tiny import tiny_model

CHATS = [
    [
        {"role": "user", "content": f"What comes after {n}?"},
        {"role": "assistant", "content": f"{n + 1}"},
    ]
    for n in range(8)
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> ChatTokenizer:
    texts = [turn["content"] for chat in CHATS for turn in chat] + ["user", "assistant"]
    save_tokenizer(train_tokenizer(texts, 300), tmp_path / "tokenizer")
    return ChatTokenizer.load(tmp_path / "tokenizer")


def test_a_model_learns_chats_and_answers(
    tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = EncodedDataset.from_rows(tokenizer.encode_chats(CHATS), tokenizer)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    before = torch.random.get_rng_state()
    config = FitConfig(epochs=150, lr=1e-2, batch_size=8, dtype="float32")
    history = fit(model, NextToken(), rows, config)
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's generator is touched"
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    assert reply(model, tokenizer, CHATS[3][:1]) == "4"
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer"}, "nothing is written"

    save_checkpoint(tmp_path / "checkpoint", model, tmp_path / "tokenizer")
    loaded = load_model(tmp_path / "checkpoint")
    assert reply(loaded, tokenizer, CHATS[5][:1]) == "6"
    (tmp_path / "problems.jsonl").write_text(
        '{"prompt": "What comes after 6?", "answer": "7"}\n'
        '{"prompt": "What comes after 2?", "answer": "5"}\n'
    )
    metrics, _ = evaluate(loaded, tokenizer, read_problems(tmp_path / "problems.jsonl"))
    assert metrics["exact"] == 0.5


def test_rows_in_memory_are_as_those_on_disk(tokenizer: ChatTokenizer) -> None:
    encoded = tokenizer.encode_chats(CHATS)
    rows = EncodedDataset.from_rows(encoded, tokenizer, max_length=20)
    for number, row in enumerate(encoded):
        ids, loss_mask = rows.row(number)
        assert ids.tolist() == list(row.ids)[:20]
        assert loss_mask.tobytes() == row.loss_mask[:20]
    rows._check_rows()
    pairs = EncodedDataset.from_rows(encoded, tokenizer, "preference")
    assert (pairs.num_samples, pairs.rows, pairs.num_sources) == (4, 8, 4)
    pairs._check_rows()
    for few, said in (([], "0 rows are no samples of 2"), (encoded[:3], "3 rows are no samples")):
        with pytest.raises(UserError, match=said):
            EncodedDataset.from_rows(few, tokenizer, "preference")
    with pytest.raises(UserError, match="row 0 has no token to train on"):
        EncodedDataset.from_rows(encoded, tokenizer, max_length=2)


def test_a_loss_is_a_mean_over_a_step(tokenizer: ChatTokenizer) -> None:
    """Written as a user would: with micro-batches of other sizes, the same weights come out."""

    def own(model, batch, progress):  # type: ignore[no-untyped-def]
        logits = model(batch.tokens, batch.predict_at).raw_logits
        losses = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
        return Loss.mean(losses, "tokens", nll=losses)

    data = EncodedDataset.from_rows(tokenizer.encode_chats(CHATS), tokenizer)
    weights = []
    for objective, size in ((own, 2), (own, 4), (NextToken(), 4)):
        model = tiny_model(vocab_size=tokenizer.vocab_size)
        steps = 8 // size
        config = FitConfig(batch_size=size, accumulation_steps=steps, dtype="float32", max_steps=2)
        history = fit(model, objective, data, config.model_copy(update={"log_interval": 1}))
        assert history.rows[-1]["nll"] == pytest.approx(history.rows[-1]["loss"])
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights[1], weights[2], atol=1e-5, rtol=1e-4)


def test_importing_it_loads_nothing() -> None:
    code = "import sys, minimind; print(sorted({'torch', 'numpy', 'pydantic'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_is_there_and_documented() -> None:
    assert 15 <= len(minimind.__all__) <= 30
    for name in minimind.__all__:
        assert getattr(minimind, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match=r"minimind has no fti; it has: .*fit"):
        minimind.fti  # noqa: B018


def test_static_checkers_see_the_same_names() -> None:
    text = Path(minimind.__file__ or "").read_text(encoding="utf-8")
    assert sorted(re.findall(r"import \w+ as (\w+)", text)) == minimind.__all__


def python_of(readme: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_readmes_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder of its own, with a checkpoint and problems where it says."""
    train, use = python_of("README.md")
    assert len([line for line in train.splitlines() if line]) <= 15
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(compile(train, "README.md", "exec"), {})
        assert capsys.readouterr().out == "42\n"
        tokenizer = ChatTokenizer.load(Path("tokenizer"))
        model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=256)
        save_checkpoint(Path("models/reason"), model, Path("tokenizer"))
        Path("data/mini_world").mkdir(parents=True)
        Path("data/mini_world/eval.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
        names: dict[str, object] = {}
        exec(compile(use, "README.md", "exec"), names)
    assert names["metrics"]["exact"] in (0.0, 1.0)  # type: ignore[index]


def test_the_reference_has_every_name() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: minimind\.([\w.]+)\.(\w+)$", text, re.MULTILINE)
    assert sorted(name for _, name in named) == minimind.__all__
    for module, name in named:
        found = importlib.import_module(f"minimind.{module}")
        assert getattr(found, name) is getattr(minimind, name)
