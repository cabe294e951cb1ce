"""GGUF files: others read the same model, tokenizer and template from them, and know whose."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from minimind.chat.template import CHAT_TEMPLATE
from minimind.chat.tokenizer import ChatTokenizer
from minimind.cli.main import app
from minimind.exports.folder import write_export
from minimind.exports.receipt import Receipt, sha256_of
from minimind.model.checkpoint import load_model, save_checkpoint
from tests.tiny import TOKENIZER_SIZE, tiny_model, tiny_tokenizer

NO_ANCESTORS = Receipt(checkpoint="models/base", checkpoint_md5=None, command="", ancestors=[])
VOCAB = TOKENIZER_SIZE + 5  # more rows than tokens, as many models have


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "models/base"
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    save_checkpoint(base, tiny_model(vocab_size=VOCAB, rope_theta=1e4), tokenizer)
    write_export(tmp_path / "it", base, NO_ANCESTORS)
    return tmp_path / "it"


def written(folder: Path, kind: str = "f16") -> Path:
    result = run(folder, kind)
    assert result.exit_code == 0, result.output
    assert list(folder.glob("*.gguf")) == []  # DVC knows what is in it
    return folder.parent / f"{folder.name}-{kind}.gguf"


def run(folder: Path, kind: str = "f16") -> Result:
    return CliRunner().invoke(app, ["gguf", str(folder), "--type", kind])


def value(file: Path, key: str) -> object:
    field = gguf.GGUFReader(file).get_field(key)
    return field.contents() if field else None


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 0), ("f16", 1e-4), ("q8_0", 0.05)])
def test_transformers_reads_the_same_model_from_it(
    folder: Path, kind: str, tolerance: float
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    file = written(folder, kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=f"../{file.name}", dtype=torch.float32
    )
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        difference = (theirs(ids).logits - stock(ids).logits).abs().max()
    assert difference <= tolerance
    assert kind == "f32" or difference > 0


def test_experts_are_stacked_and_none_is_lost(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=TOKENIZER_SIZE, num_experts=4)
    save_checkpoint(tmp_path / "moe", model, tiny_tokenizer(tmp_path / "tokenizer"))
    reader = gguf.GGUFReader(written(tmp_path / "moe", "f32"))
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    mixture = model.model.layers[1].mlp
    for name in ("gate", "up", "down"):
        for number, expert in enumerate(mixture.experts):
            weight = getattr(expert, f"{name}_proj").weight
            assert torch.equal(found[f"blk.1.ffn_{name}_exps.weight"][number], weight)
    assert torch.equal(found["blk.1.ffn_gate_inp.weight"], mixture.gate.weight)
    num_values = sum(tensor.numel() for tensor in found.values())
    assert num_values == sum(p.numel() for p in model.parameters()) + 2 * 4  # the router's biases


def test_its_tokenizer_and_template_are_ours(folder: Path) -> None:
    file, tokenizer = written(folder), ChatTokenizer.load(folder)
    tokens, types = value(file, "tokenizer.ggml.tokens"), value(file, "tokenizer.ggml.token_type")
    assert isinstance(tokens, list) and isinstance(types, list)
    assert value(file, "tokenizer.chat_template") == CHAT_TEMPLATE
    assert value(file, "tokenizer.ggml.pre") == "smollm"
    assert value(file, "tokenizer.ggml.eos_token_id") == tokenizer.end_id
    assert [tokens[i] for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    own = {tokens[i] for i, kind in enumerate(types) if kind == gguf.TokenType.USER_DEFINED}
    assert own == tokenizer.added_tags
    assert len(tokens) == VOCAB
    assert types.count(gguf.TokenType.UNUSED) == VOCAB - tokenizer.vocab_size


def test_a_file_is_known_by_the_receipt_of_its_folder(folder: Path) -> None:
    file = written(folder)
    assert value(file, "minimind.receipt.sha256") == sha256_of(folder / "lineage.json")
    before = file.read_bytes()
    assert written(folder).read_bytes() == before
    assert "made from this folder" in verified(folder, 0)
    file.write_bytes(before[:-5] + b"\1" + before[-4:])
    assert "its tensors are others than it says" in verified(folder, 1)
    file.write_bytes(before[:1000])
    assert "cannot be read" in verified(folder, 1)
    file.write_bytes(before)
    file.rename(folder / file.name)  # as it lies on a hub
    assert "made from this folder" in verified(folder, 0)
    (folder / "lineage.json").write_text((folder / "lineage.json").read_text() + "\n")
    assert "another receipt" in verified(folder, 1)


def verified(folder: Path, expect: int) -> str:
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exit_code == expect, result.output
    return result.output


def test_what_llama_cpp_would_read_otherwise_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    assert "is not what its receipt says: files: config.json" in run(folder).stderr
    assert not list(folder.parent.glob("*.gguf*"))
    base = folder.parent / "models/base"
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (base / "tokenizer.json").chmod(0o644)
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = run(base)
    assert result.exit_code == 1
    assert "its pre_tokenizer is none of those" in result.stderr
    assert not list(base.parent.glob("*.gguf*"))


def test_ollama_gets_our_control_tokens_and_tags(folder: Path) -> None:
    written(folder)
    text = (folder.parent / "it-f16.Modelfile").read_text()
    assert text.startswith("FROM ./it-f16.gguf\n")
    assert f"PARAMETER num_ctx {load_model(folder).config.max_positions}" in text
    template = text.split('"""')[1]
    assert template.count("{{") == template.count("}}")
    for part in ("<|im_start|>user", "<think>\n{{ .Thinking }}\n</think>", "<tool_response>"):
        assert part in template, part
