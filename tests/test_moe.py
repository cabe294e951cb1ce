"""Mixture of experts: size, router, auxiliary loss, checkpoints; nothing depends on the packing."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_MoeForCausalLM

from minimind.compute.compiling import can_compile
from minimind.datasets.batches import PackedBatch, count, pack
from minimind.errors import UserError
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.generate import generate
from minimind.model.moe import FeedForward, MixtureOfExperts, Routing, aux_loss_and_load
from minimind.model.reward import dense_part
from minimind.model.transformer import ModelConfig, ModelShape, PackedTokens, Transformer
from minimind.objectives.dpo import Dpo
from minimind.objectives.loss import Loss, Term
from minimind.objectives.next_token import NextToken
from minimind.params import load_section
from tests.test_training import loss_and_gradient
from tests.tiny import (
    TOKENIZER_SIZE,
    random_pairs,
    random_rows,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    write_rows,
)


def moe_model(seed: int = 0, **changes: int | float) -> Transformer:
    """A tiny model of larger weights than at the start of training, so that routers decide."""
    model = tiny_model(seed, num_experts=4, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def random_batch(directory: Path, num_rows: int = 6) -> PackedBatch:
    return pack(write_rows(directory, random_rows(num_rows)), np.arange(num_rows), extras={})


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    return tiny_tokenizer(tmp_path / "tokenizer")


def test_parameter_count_is_the_recipes() -> None:
    config = ModelConfig(
        vocab_size=6400,
        hidden_size=640,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        max_positions=512,
        rope_theta=1e6,
        norm_eps=1e-5,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        router_aux_loss_coef=0.1,
    )
    with torch.device("meta"):
        assert Transformer(config).num_parameters == 145_029_760


def test_no_token_takes_more_experts_than_there_are(tmp_path: Path) -> None:
    shape = tiny_config(num_experts=2, num_experts_per_token=2).model_dump(exclude={"vocab_size"})
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"model": shape}))
    assert load_section(params, "model", ModelShape).num_experts == 2
    params.write_text(json.dumps({"model": shape | {"num_experts": 1}}))
    with pytest.raises(UserError, match="num_experts_per_token 2 must be from 1 to num_experts 1"):
        load_section(params, "model", ModelShape)
    params.write_text(json.dumps({"model": shape | {"num_experts": 0}}))
    assert load_section(params, "model", ModelShape).num_experts == 0


def plain_mixture(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The definition, one token after the other."""
    out = []
    for token in x:
        probabilities = torch.softmax(moe.gate.weight @ token, 0)
        best = sorted(range(len(moe.experts)), key=lambda e: -probabilities[e].item())
        best = best[: moe.num_experts_per_token]
        total = sum(probabilities[e] for e in best)
        y = sum(probabilities[e] / total * moe.experts[e](token) for e in best)
        out.append(y if moe.shared_experts is None else y + moe.shared_experts(token))
    return torch.stack(out)


@pytest.mark.parametrize(("per_token", "shared"), [(2, 1), (1, 0), (3, 2)])
def test_grouped_experts_are_the_definition(per_token: int, shared: int) -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(16, 24, 5, per_token, shared)
    x = torch.randn(40, 16, requires_grad=True)
    inputs = [x, *moe.parameters()]
    out, routing = moe(x)
    assert routing.chosen.flatten().bincount(minlength=5).min() > 0
    expected = plain_mixture(moe, x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    # top-1 weights are 1 whatever the router says: its gradient is zero there, not missing
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True)
    for ours, theirs in zip(
        torch.autograd.grad((out * weights).sum(), inputs), expected_gradients, strict=True
    ):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_shapes_of_decoding_give_the_same_outputs() -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(16, 24, 4, 2, 1)
    x = torch.randn(6, 16)
    torch.testing.assert_close(moe(x.view(6, 1, 16))[0].view(6, 16), moe(x)[0])
    torch.testing.assert_close(moe(x[:1])[0], moe(x)[0][:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_without_tokens_has_zero_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(16, 24, 4, 2, 1)
    x = torch.rand(10, 16)
    with torch.no_grad():
        moe.gate.weight[3] = -10.0  # all inputs are positive: never chosen
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out, routing = moe(x)
    assert not (routing.chosen == 3).any()
    out.square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != name.startswith("experts.3."), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_leaves_the_routing_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(64, 64, 8, 2, 1)
    x = torch.randn(500, 64)
    plain = moe.route(x)
    with torch.autocast("cpu", dtype):
        out, mixed = moe(x)
    assert mixed.probabilities.dtype == torch.float32
    assert torch.equal(mixed.probabilities, plain.probabilities)
    assert torch.equal(mixed.chosen, plain.chosen)
    torch.testing.assert_close(out.float(), moe(x)[0], rtol=0.02, atol=0.02)

    model, batch = moe_model(), random_batch(tmp_path)
    with torch.autocast("cpu", dtype):
        output = model(batch.tokens, batch.predict_at)
    assert output.aux_loss.dtype == output.expert_load.dtype == torch.float32
    (output.logits.sum() + output.aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def routings_of(model: Transformer, batch: PackedBatch) -> list[Routing]:
    found: list[Routing] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _module, _inputs, output: found.append(output[1]))
        for layer in model.model.layers
    ]
    model(batch.tokens, batch.predict_at)
    for hook in hooks:
        hook.remove()
    return found


def test_balance_is_the_formula(tmp_path: Path) -> None:
    model, batch = moe_model(router_aux_loss_coef=0.3), random_batch(tmp_path)
    output = model(batch.tokens, batch.predict_at)
    expected, loads = 0.0, np.zeros((2, 4))
    starts = batch.tokens.boundaries.tolist()
    for layer, routing in enumerate(routings_of(model, batch)):
        for start, end in pairwise(starts):
            length = end - start
            for expert in range(4):
                chosen = int((routing.chosen[start:end] == expert).sum())
                mean = routing.probabilities[start:end, expert].mean().item()
                expected += 0.3 * chosen / (length * 2 / 4) * mean
                loads[layer, expert] += chosen / (2 * length)
    assert len(set(loads.flatten().round(3))) > 4, "the routing should not be trivial"
    assert output.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.expert_load.numpy() == pytest.approx(loads, rel=1e-5)


def test_balance_is_1_when_even_and_experts_over_chosen_when_crowded() -> None:
    boundaries = torch.tensor([0, 4, 4, 8], dtype=torch.int32)  # one of the samples is empty
    uneven = torch.rand(8, 4).softmax(-1)
    cycle = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    same = torch.tensor([[0, 1]]).repeat(8, 1)
    even_choices, load = aux_loss_and_load([Routing(uneven, cycle)] * 3, boundaries)
    assert float(even_choices) == pytest.approx(2 * 3)  # samples · layers
    assert load.tolist() == [[0.5] * 4] * 3
    even_probabilities, load = aux_loss_and_load(
        [Routing(torch.full((8, 4), 0.25), same)], boundaries
    )
    assert float(even_probabilities) == pytest.approx(2)
    assert load.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    crowded = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).repeat(8, 1)
    assert float(aux_loss_and_load([Routing(crowded, same)], boundaries)[0]) == pytest.approx(2 * 2)


def test_a_router_that_cannot_tell_costs_alpha_a_layer(tmp_path: Path) -> None:
    model, batch = moe_model(router_aux_loss_coef=0.1, num_layers=3), random_batch(tmp_path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    loss = NextToken()(model, batch, 0.0)
    assert loss.terms["aux_loss"].per == "rows"
    assert float(loss.terms["aux_loss"].total.detach()) / batch.counts.rows == pytest.approx(
        0.1 * 3
    )


def test_balance_does_not_depend_on_packing(tmp_path: Path) -> None:
    dataset, model = write_rows(tmp_path, random_rows(8)), moe_model()

    def balance(samples: list[int]) -> tuple[float, torch.Tensor]:
        batch = pack(dataset, np.array(samples), extras={})
        output = model(batch.tokens, batch.predict_at)
        return float(output.aux_loss), output.expert_load

    whole = balance(list(range(8)))
    parts = [balance([5, 2]), balance([7]), balance([0, 6, 1, 3, 4])]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(sum(part[1] for part in parts), whole[1])


@pytest.mark.parametrize("kind", ["next_token", "dpo"])
def test_four_micro_batches_are_one_big_batch(tmp_path: Path, kind: str) -> None:
    if kind == "dpo":
        dataset = write_rows(tmp_path, random_pairs(10), "preference")
        objective = Dpo(beta=0.1, reduction="sum", nll_weight=1.0)
    else:
        dataset, objective = write_rows(tmp_path, random_rows(10)), NextToken()

    def batch(samples: np.ndarray) -> PackedBatch:
        packed = pack(dataset, samples, extras={})
        packed.extras["reference"] = torch.from_numpy(np.sin(packed.rows).astype(np.float32))
        return packed

    samples = np.arange(10)
    totals = count(dataset, samples)
    big_model, small_model = moe_model(), moe_model()
    big = loss_and_gradient(big_model, objective, [batch(samples)], totals)
    parts = [batch(samples[i : i + 3]) for i in (0, 3, 6, 9)]
    small = loss_and_gradient(small_model, objective, parts, totals)
    assert small[0] == pytest.approx(big[0], rel=1e-6)
    torch.testing.assert_close(small[1], big[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_shared_experts", [0, 1, 2])
def test_the_dense_part_of_a_mixture_computes_what_all_tokens_see(
    tmp_path: Path, num_shared_experts: int
) -> None:
    mixture = moe_model(num_shared_experts=num_shared_experts)
    dense = dense_part(mixture, seed=1)
    with torch.no_grad():
        for layer in mixture.model.layers:
            for expert in layer.mlp.experts:
                expert.down_proj.weight.zero_()
            if num_shared_experts == 2:
                layer.mlp.shared_experts.down_proj.weight.zero_()
        if num_shared_experts != 1:  # then feed-forward networks are new: leave them out too
            for layer in dense.model.layers:
                layer.mlp.down_proj.weight.zero_()
    batch = random_batch(tmp_path)
    expected = mixture(batch.tokens, batch.predict_at).logits
    torch.testing.assert_close(dense(batch.tokens, batch.predict_at).logits, expected)


@pytest.mark.skipif(not can_compile(), reason="PyTorch's path has spaces")
def test_compiled_experts_learn_as_eager_ones_do(tmp_path: Path) -> None:
    batch = random_batch(tmp_path)
    eager, model = moe_model(), moe_model()
    compiled = torch.compile(model, dynamic=True)
    for form in (eager, compiled):
        terms = NextToken()(form, batch, 0.0).terms
        (terms["next_token"].total + terms["aux_loss"].total).backward()
    for (name, expected), (_, found) in zip(
        eager.named_parameters(), model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["next_token", "dpo"])
def test_the_balance_loss_is_in_every_loss_and_the_load_in_the_history(
    tmp_path: Path, kind: str
) -> None:
    model = moe_model()
    if kind == "dpo":
        dataset, objective = (
            write_rows(tmp_path, random_pairs(3), "preference"),
            Dpo(0.1, "sum", 0.0),
        )
        batch = pack(dataset, np.arange(3), {})
        batch.extras["reference"] = torch.zeros(6)
    else:
        batch, objective = random_batch(tmp_path), NextToken()
    loss: Loss = objective(model, batch, 0.0)
    assert list(loss.terms) == [kind, "aux_loss"]
    balance = loss.terms["aux_loss"].total
    assert torch.equal(balance, model(batch.tokens, batch.predict_at).aux_loss)
    balance.backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.model.layers)
    loads: list[Term] = [loss.metrics[f"load_expert_{expert}"] for expert in range(4)]
    assert {term.per for term in loads} == {"rows"}
    assert sum(float(term.total) for term in loads) == pytest.approx(batch.counts.rows)

    dense = objective(tiny_model(), batch, 0.0)
    assert list(dense.terms) == [kind]
    assert not any("load" in name for name in dense.metrics)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    batch = random_batch(tmp_path)
    gradients = []
    for recompute in (False, True):
        model = moe_model().train()
        model.model.recompute_layers = recompute
        loss = NextToken()(model, batch, 0.0)
        (loss.terms["next_token"].total + loss.terms["aux_loss"].total).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_greedy_decoding_with_a_cache_is_the_models_own_choice() -> None:
    model = moe_model(seed=2)
    prompts = [ids for ids, _ in random_rows(8)]
    completions = generate(model, prompts, max_new_tokens=8, end_id=2, dtype="float32")
    for prompt, new in zip(prompts, completions.ids, strict=True):
        ids = prompt + new
        length = torch.tensor([0, len(ids)], dtype=torch.int32)
        tokens = PackedTokens(torch.tensor(ids), torch.arange(len(ids)), length, len(ids))
        best = model.logits(model.hidden(tokens)).argmax(-1).tolist()
        assert new == best[len(prompt) - 1 : -1]
    assert len({token for new in completions.ids for token in new}) > 5


@pytest.mark.parametrize("shared", [1, 2, 0])
def test_stock_ernie_loads_a_checkpoint_with_equal_logits(
    tmp_path: Path, tokenizer_directory: Path, shared: int
) -> None:
    model = moe_model(seed=3, num_shared_experts=shared)
    save_checkpoint(tmp_path / "model", model, tokenizer_directory)
    ernie, problems = Ernie4_5_MoeForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(problems.values())
    assert ernie.generation_config.eos_token_id == 2
    stored = load_file(tmp_path / "model" / "model.safetensors")
    biases = [tensor for name, tensor in stored.items() if "bias" in name]
    assert sum(bias.numel() for bias in biases) == 2 * 4
    assert not any(bias.any() for bias in biases)

    rows = random_rows(4)
    batch = pack(write_rows(tmp_path / "data", rows), np.arange(4), extras={})
    ours = model.logits(model.hidden(batch.tokens))
    theirs = torch.cat([ernie(torch.tensor([ids])).logits[0] for ids, _ in rows])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    ernie.save_pretrained(tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert back.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True)
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, tokenizer_directory: Path) -> None:
    model = moe_model(seed=5, router_aux_loss_coef=0.25, vocab_size=TOKENIZER_SIZE)
    save_checkpoint(tmp_path / "a", model, tokenizer_directory)
    loaded = load_model(tmp_path / "a")
    assert loaded.config == model.config
    save_checkpoint(tmp_path / "b", loaded, tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_experts_chosen_with_a_bias_are_refused(tmp_path: Path, tokenizer_directory: Path) -> None:
    save_checkpoint(tmp_path / "model", moe_model(), tokenizer_directory)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.moe_statics.e_score_correction_bias"][0, 2] = 0.5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.moe_statics.* is not zero"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_num_experts": 0}, "moe_num_experts is 0"),
        ({"moe_num_experts": 1}, "num_experts_per_token 2 must be from 1 to num_experts 1"),
        ({"moe_num_experts": 5}, r"layers\.0\.mlp\.experts\.4\..* is missing"),
        ({"moe_intermediate_size": 96}, r"is \(32, 128\), but config.json calls for \(32, 96\)"),
        ({"model_type": "llama"}, r"layers\.0\.mlp\.down_proj\.weight is missing"),
    ],
)
def test_a_configuration_of_another_model_is_one_clear_line(
    tmp_path: Path, tokenizer_directory: Path, change: dict[str, int | str], message: str
) -> None:
    save_checkpoint(tmp_path / "model", moe_model(), tokenizer_directory)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_a_dense_model_is_untouched_by_the_experts_parameters(
    tmp_path: Path, tokenizer_directory: Path
) -> None:
    model = tiny_model(
        num_experts=0, num_experts_per_token=7, num_shared_experts=3, vocab_size=TOKENIZER_SIZE
    )
    assert all(isinstance(layer.mlp, FeedForward) for layer in model.model.layers)
    save_checkpoint(tmp_path / "model", model, tokenizer_directory)
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": TOKENIZER_SIZE,
    }
    assert load_model(tmp_path / "model").config == model.config
    output = model(*_first_tokens(tmp_path))
    assert output.aux_loss is None and output.expert_load is None
    assert math.isfinite(F.cross_entropy(output.logits, torch.ones(3, dtype=torch.int64)).item())


def _first_tokens(tmp_path: Path) -> tuple[PackedTokens, torch.Tensor]:
    return random_batch(tmp_path / "data").tokens, torch.arange(3)
