"""The model: sizes, equality with the plain padded computation, Hugging Face checkpoints."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from minimind.datasets.batches import pack
from minimind.errors import UserError
from minimind.model import transformer
from minimind.model.attention import _attention_per_sample, packed_attention
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.transformer import ModelConfig, Transformer
from tests.tiny import TOKENIZER_SIZE, random_rows, tiny_model, tiny_tokenizer, write_rows


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "parameters"),
    [
        (512, 1, 6_096_384),
        (512, 2, 8_915_456),
        (768, 2, 17_305_344),
        (512, 8, 25_829_888),
        (768, 16, 104_030_976),
    ],
)
def test_parameter_counts_are_the_recipes(
    hidden_size: int, num_layers: int, parameters: int
) -> None:
    config = ModelConfig(
        vocab_size=6400,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=8,
        num_kv_heads=2,
        max_positions=512,
        rope_theta=1e6,
        norm_eps=1e-5,
        num_experts=0,
        num_experts_per_token=2,
        num_shared_experts=1,
        router_aux_loss_coef=0.1,
    )
    with torch.device("meta"):
        assert Transformer(config).num_parameters == parameters


def padded_losses(model: Transformer, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, V] by the plain way: padding, a mask, and attention written out."""

    def attend(_layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = scores.masked_fill(~(causal & attention[:, None, None, :]), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model.logits(model.model(ids, positions, attend))


def test_packed_equals_padded_in_loss_and_gradient(tmp_path: Path) -> None:
    rows = random_rows(7)
    batch = pack(write_rows(tmp_path, rows), np.arange(7), extras={})
    packed_model, padded_model = tiny_model(), tiny_model()

    logits = packed_model(batch.tokens, batch.predict_at).logits
    packed_loss = F.cross_entropy(logits, batch.targets)
    packed_loss.backward()

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [0] * (longest - len(r)) for r, _ in rows])
    real = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r, _ in rows]).bool()
    trained = torch.tensor([c + [0] * (longest - len(c)) for _, c in rows]) > 0
    all_logits = padded_losses(padded_model, ids, real)
    padded_loss = F.cross_entropy(all_logits[:, :-1][trained[:, 1:]], ids[:, 1:][trained[:, 1:]])
    padded_loss.backward()

    torch.testing.assert_close(packed_loss, padded_loss)
    for (name, ours), theirs in zip(
        packed_model.named_parameters(), padded_model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_what_fills_up_a_step_changes_nothing(
    num_experts: int, num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack(write_rows(tmp_path, random_rows(num_rows)), np.arange(num_rows), extras={})
    results = []
    for fill in (1, 32, len(batch.tokens.ids), len(batch.predict_at)):
        monkeypatch.setattr(transformer, "FILL", fill)
        model = tiny_model(num_experts=num_experts)
        output = model(batch.tokens, batch.predict_at)
        loss = F.cross_entropy(output.logits, batch.targets, reduction="sum")
        if num_experts:
            assert output.aux_loss is not None
            loss = loss + output.aux_loss
        loss.backward()
        assert len(model.hidden(batch.tokens)) == len(batch.tokens.ids)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((loss, output.logits, output.expert_load, gradients))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_the_portable_attention_is_the_same_function() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    boundaries = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    plain = [t.clone().requires_grad_() for t in (q, k, v)]
    out, expected = (
        packed_attention(*ours, boundaries, 5),
        _attention_per_sample(*plain, boundaries),
    )
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_sample_does_not_see_its_neighbours(tmp_path: Path) -> None:
    rows = random_rows(3)
    together = pack(write_rows(tmp_path / "a", rows), np.arange(3), extras={})
    alone = pack(write_rows(tmp_path / "b", rows[1:2]), np.arange(1), extras={})
    model = tiny_model()
    logits = model(together.tokens, together.predict_at).logits[together.row_of_target == 1]
    torch.testing.assert_close(logits, model(alone.tokens, alone.predict_at).logits)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    batch = pack(write_rows(tmp_path, random_rows(4)), np.arange(4), extras={})
    gradients = []
    for recompute in (False, True):
        model = tiny_model().train()
        model.model.recompute_layers = recompute
        F.cross_entropy(model(batch.tokens, batch.predict_at).logits, batch.targets).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / "tokenizer")


def test_stock_llama_loads_a_checkpoint_with_equal_logits(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    model = tiny_model(seed=3)
    save_checkpoint(tmp_path / "model", model, tokenizer_directory)
    llama, problems = LlamaForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(problems.values())
    assert llama.generation_config.eos_token_id == 2

    rows = random_rows(4)
    batch = pack(write_rows(tmp_path / "data", rows), np.arange(4), extras={})
    ours = model.logits(model.hidden(batch.tokens))
    theirs = torch.cat([llama(torch.tensor([ids])).logits[0] for ids, _ in rows])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, tokenizer_directory: Path) -> None:
    model = tiny_model(seed=5, vocab_size=TOKENIZER_SIZE)
    save_checkpoint(tmp_path / "a", model, tokenizer_directory)
    save_checkpoint(tmp_path / "b", load_model(tmp_path / "a"), tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert file.stat().st_mode & 0o200, f"{file.name} must not inherit a read-only mode"
        umask = os.umask(0)
        os.umask(umask)
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask  # as other files: safetensors' are 600


def _cut_short(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _set_config(**changes):  # type: ignore[no-untyped-def]
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))

    return change


def _own_head(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_own_head, "lm_head.weight is not model.embed_tokens.weight, but tie_word_embeddings is"),
        (_set_config(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
        (_set_config(rope_parameters={"rope_theta": 1e4, "rope_type": "linear"}), "'linear'; only"),
        (_set_config(rope_scaling={"type": "yarn"}), "the key 'factor' is missing"),
        (_set_config(attention_bias=True), "attention_bias is True; only False is supported"),
        (_set_config(mlp_bias=True), "mlp_bias is True; only False is supported"),
        (
            _set_config(head_dim=64),
            r"k_proj.weight is \(16, 32\), but config.json calls for \(128, 32",
        ),
        (_cut_short, "cannot be read"),
        (_set_config(num_hidden_layers=3), "model.layers.2.*missing"),
        (_set_config(model_type="gpt2"), "'gpt2'; allowed is"),
        (lambda d: (d / "config.json").unlink(), "is not a checkpoint"),
        (lambda d: (d / "model.safetensors").unlink(), "is missing; run its stage again"),
        (lambda d: (d / "config.json").write_text("{"), "is not valid"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(
    tmp_path: Path, tokenizer_directory: Path, damage, message: str
) -> None:
    save_checkpoint(tmp_path / "model", tiny_model(), tokenizer_directory)
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    save_checkpoint(tmp_path / "model", model, tokenizer_directory)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        load_model(tmp_path / "model")
