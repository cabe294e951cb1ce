"""Generation: cached equals uncached and Hugging Face; a row's noise is its own."""

import copy
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from minimind.compute.matmuls import choose_matmuls
from minimind.errors import UserError
from minimind.model import generate as generate_module
from minimind.model.checkpoint import save_checkpoint
from minimind.model.generate import Completions, Sampling, generate
from minimind.model.transformer import PackedTokens, Transformer
from tests.tiny import VOCAB_SIZE, tiny_model, tiny_tokenizer

END = 2


def lively_model(seed: int = 0, **changes: int | float) -> Transformer:
    """A random model whose distributions are neither flat nor certain."""
    model = tiny_model(seed, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
    return model.eval()


def random_prompts(num_prompts: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 24, size=num_prompts)
    return [rng.integers(3, VOCAB_SIZE, size=length).tolist() for length in lengths]


def logits_of(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one row by the packed model, without any cache."""
    length = len(ids)
    tokens = PackedTokens(
        torch.tensor(ids),
        torch.arange(length),
        torch.tensor([0, length], dtype=torch.int32),
        length,
    )
    with torch.no_grad():
        return model(tokens, torch.arange(length)).logits


def end_that_comes_up(model: Transformer, prompts: list[list[int]], step: int) -> int:
    """A token that some rows generate greedily at a step: used as the end token, it ends them."""
    plain = generate(model, prompts, max_new_tokens=step + 1, end_id=-1, dtype="float32")
    tokens = [row[step] for row in plain.ids]
    return max(set(tokens), key=tokens.count)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return lively_model()


def test_greedy_is_what_the_model_says_without_a_cache(model: Transformer) -> None:
    prompts = random_prompts(12)
    end_id = end_that_comes_up(model, prompts, step=9)
    found = generate(model, prompts, max_new_tokens=40, end_id=end_id, dtype="float32")
    for prompt, ids in zip(prompts, found.ids, strict=True):
        expected: list[int] = []
        while len(expected) < 40 and end_id not in expected:
            expected.append(int(logits_of(model, prompt + expected)[-1].argmax()))
        assert ids == expected
    assert 0 < sum(found.finished) < len(prompts), "rows that end early and rows that do not"


def test_greedy_is_hugging_faces(model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", model, tiny_tokenizer(tmp_path / "tokenizer"))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    prompts = random_prompts(8, seed=1)
    end_id = end_that_comes_up(model, prompts, step=6)
    ours = generate(model, prompts, max_new_tokens=30, end_id=end_id, dtype="float32")
    for prompt, ids in zip(prompts, ours.ids, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=end_id
        )
        assert ids == output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("finished_share", [0.0, 0.2, 2.0])
def test_when_finished_rows_leave_changes_nothing(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, finished_share: float
) -> None:
    prompts = random_prompts(20)
    end_id = end_that_comes_up(model, prompts, step=3)
    expected = generate(model, prompts, max_new_tokens=30, end_id=end_id, dtype="float32")
    monkeypatch.setattr(generate_module, "FINISHED_SHARE", finished_share)
    found = generate(model, prompts, max_new_tokens=30, end_id=end_id, dtype="float32")
    assert found == expected


def test_rows_end_with_the_end_token_and_nothing_follows(model: Transformer) -> None:
    prompts = random_prompts(20)
    end_id = end_that_comes_up(model, prompts, step=3)
    found = generate(model, prompts, max_new_tokens=12, end_id=end_id, dtype="float32")
    for ids, finished in zip(found.ids, found.finished, strict=True):
        assert finished == (ids[-1] == end_id)
        assert end_id not in ids[:-1]
        assert len(ids) == 12 or finished


def test_rows_end_with_the_first_of_several_end_tokens(model: Transformer) -> None:
    prompts = random_prompts(40)
    free = generate(model, prompts, max_new_tokens=30, end_id=-1, dtype="float32")

    def firsts(ends: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Where each end token comes up first in each row; 30 where it does not."""
        return [tuple(ids.index(e) if e in ids else 30 for e in ends) for ids in free.ids]

    def tells_all(ends: tuple[int, ...]) -> bool:
        """Whether there are rows where the one comes first, where the other does, and neither."""
        places = firsts(ends)
        one, other = any(a < b < 30 for a, b in places), any(b < a < 30 for a, b in places)
        return one and other and (30, 30) in places

    ends = next(ends for ends in permutations(range(VOCAB_SIZE), 2) if tells_all(ends))
    assert any(ids.count(end) > 1 for ids in free.ids for end in ends), "it may come up again"
    found = generate(
        model,
        prompts,
        max_new_tokens=30,
        end_id=ends[0],
        other_end_ids=[ends[1], VOCAB_SIZE + 1],
        dtype="float32",
        with_logprobs=True,
    )
    stops = list(map(min, firsts(ends)))
    assert found.ids == [ids[: stop + 1] for ids, stop in zip(free.ids, stops, strict=True)]
    assert found.finished == [stop < 30 for stop in stops]
    assert found.logprobs is not None
    assert list(map(len, found.logprobs)) == list(map(len, found.ids))


def test_no_row_is_longer_than_the_model_allows() -> None:
    model = lively_model(max_positions=20)
    prompts = [[5] * 7, [6] * 19, [7]]
    found = generate(model, prompts, max_new_tokens=50, end_id=-1, dtype="float32")
    assert [len(ids) for ids in found.ids] == [13, 1, 19]
    assert found.finished == [False] * 3
    with pytest.raises(UserError, match="20 tokens, but the model has only 20 positions"):
        generate(model, [[5] * 20], max_new_tokens=1, end_id=-1, dtype="float32")


def sampled(
    model: Transformer, prompts: list[list[int]], rows: list[int], **changes: float
) -> Completions:
    values = {"temperature": 0.9, "top_p": 1.0, "seed": 3} | changes
    sampling = Sampling(
        temperature=values["temperature"],
        top_p=values["top_p"],
        seed=int(values["seed"]),
        keys=rows,
    )
    return generate(
        model,
        prompts,
        max_new_tokens=25,
        end_id=END,
        dtype="float32",
        sampling=sampling,
        with_logprobs=True,
    )


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_sampled_row_does_not_depend_on_the_others(model: Transformer, top_p: float) -> None:
    prompts, rows = random_prompts(16), list(range(100, 116))
    together = sampled(model, prompts, rows, top_p=top_p)
    order = np.random.default_rng(0).permutation(16)
    for part in (order[:1], order[1:6], order[6:]):
        apart = sampled(model, [prompts[i] for i in part], [rows[i] for i in part], top_p=top_p)
        assert apart.ids == [together.ids[i] for i in part]
    assert sampled(model, prompts, rows, top_p=top_p, seed=4).ids != together.ids
    assert sampled(model, prompts, rows[::-1], top_p=top_p).ids != together.ids


def test_more_tokens_continue_the_same_rows(model: Transformer) -> None:
    sampling = Sampling(temperature=1.0, top_p=1.0, seed=0, keys=range(5))
    prompts = random_prompts(5)
    short, long = (
        generate(model, prompts, max_new_tokens=n, end_id=-1, dtype="float32", sampling=sampling)
        for n in (7, 40)
    )
    assert [ids[:7] for ids in long.ids] == short.ids


def test_several_samples_of_a_prompt_are_those_of_the_prompt_repeated(model: Transformer) -> None:
    prompts = random_prompts(4)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=0, keys=range(12))
    repeated = [prompt for prompt in prompts for _ in range(3)]
    one, other = (
        generate(
            model,
            some,
            max_new_tokens=20,
            end_id=END,
            dtype="float32",
            sampling=sampling,
            num_samples_per_prompt=num_samples,
        )
        for some, num_samples in ((prompts, 3), (repeated, 1))
    )
    assert one == other
    assert one.ids[0] != one.ids[1]


def first_tokens(model: Transformer, prompt: list[int], top_p: float, num_rows: int) -> list[int]:
    sampling = Sampling(temperature=0.7, top_p=top_p, seed=11, keys=range(num_rows))
    found = generate(
        model,
        [prompt],
        max_new_tokens=1,
        end_id=-1,
        dtype="float32",
        sampling=sampling,
        num_samples_per_prompt=num_rows,
    )
    return [ids[0] for ids in found.ids]


def chi_square(tokens: list[int], probabilities: torch.Tensor) -> float:
    """Pearson's statistic over its degrees of freedom; rare tokens together make one class."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    kept = expected > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum() / (kept.sum() - 1))


def test_samples_are_distributed_as_the_softmax_says(model: Transformer) -> None:
    prompt = random_prompts(1, seed=5)[0]
    probabilities = (logits_of(model, prompt)[-1] / 0.7).softmax(-1)
    tokens = first_tokens(model, prompt, 1.0, 8_000)
    assert chi_square(tokens, probabilities) < 1.5
    assert chi_square(tokens, (logits_of(model, prompt)[-1]).softmax(-1)) > 5, "another temperature"


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_nucleus_and_its_proportions(model: Transformer, top_p: float) -> None:
    prompt = random_prompts(1, seed=5)[0]
    probabilities = (logits_of(model, prompt)[-1] / 0.7).softmax(-1)
    nucleus: list[int] = []
    mass = 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass < top_p:
            nucleus.append(token)
            mass += float(probabilities[token])
    tokens = first_tokens(model, prompt, top_p, 8_000)
    assert set(tokens) <= set(nucleus)
    kept = torch.zeros_like(probabilities)
    kept[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    assert len(nucleus) == 1 or chi_square(tokens, kept) < 1.5


@pytest.mark.parametrize("vocab_size", [7, 64, 1000])
def test_a_token_is_where_the_cumulative_distribution_passes_its_number(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    probabilities = (3 * torch.randn(400, vocab_size, generator=generator)).softmax(-1)
    probabilities[torch.rand(probabilities.shape, generator=generator) < 0.3] = 0
    probabilities[:, 3] += 1e-6  # one at least is left
    uniforms = torch.rand(400, dtype=torch.float64, generator=generator).clamp(min=1e-300)
    uniforms[:100] = 1.0
    uniforms[100:200] = 1e-300
    tokens = generate_module._draw(probabilities, uniforms, 1.0)
    cumulative = probabilities.double().cumsum(-1)
    expected = (cumulative < uniforms[:, None] * cumulative[:, -1:]).sum(-1)
    middle = slice(200, None)  # at the ends, the last bit of a sum decides
    assert tokens[middle].tolist() == expected[middle].tolist()
    assert (probabilities[torch.arange(400), tokens] > 0).all()


def test_a_nucleus_larger_than_the_first_guess_is_found() -> None:
    falling = torch.arange(1000.0, 0, -1)
    peaked = torch.full((1000,), 1e-3)
    peaked[7] = 1e3
    even = torch.ones(1000)  # all are as likely as the last: they belong together
    probabilities = torch.stack([row / row.sum() for row in (falling, peaked, even)])
    threshold = generate_module._nucleus_threshold(probabilities, 0.4)
    num_needed = int((probabilities[0].cumsum(0) < 0.4).sum()) + 1
    assert num_needed > 64
    assert (probabilities >= threshold).sum(-1).tolist() == [num_needed, 1, 1000]


def test_logprobs_are_those_of_the_model(model: Transformer) -> None:
    prompts = random_prompts(6)
    found = sampled(model, prompts, list(range(6)), temperature=0.7, top_p=0.8)
    assert found.logprobs is not None
    for prompt, ids, logprobs in zip(prompts, found.ids, found.logprobs, strict=True):
        logits = logits_of(model, prompt + ids)[len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_casts_every_weight_once(model: Transformer) -> None:
    choose_matmuls("native")  # in float32 they are converted again, for each product
    prompts = random_prompts(4)
    with torch.profiler.profile(record_shapes=True) as profile:
        generate(model, prompts, max_new_tokens=10, end_id=-1, dtype="bfloat16")
    # Copies of the shape of gate_proj and up_proj, which nothing else has.
    shape = list(model.model.layers[0].mlp.up_proj.weight.shape)
    casts = [
        event.count
        for event in profile.key_averages(group_by_input_shape=True)
        if event.key == "aten::_to_copy" and event.input_shapes[0] == shape
    ]
    assert sum(casts) == 2 * model.config.num_layers


def test_bfloat16_is_near_float32(model: Transformer) -> None:
    prompts = random_prompts(8)
    wide, narrow = (
        generate(model, prompts, max_new_tokens=1, end_id=-1, dtype=dtype, with_logprobs=True)
        for dtype in ("float32", "bfloat16")
    )
    assert wide.logprobs is not None and narrow.logprobs is not None
    assert wide.logprobs != narrow.logprobs
    np.testing.assert_allclose(narrow.logprobs, wide.logprobs, atol=0.1)


@pytest.mark.parametrize("num_shared", [0, 1, 17])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_shared_beginning_changes_nothing(
    model: Transformer, num_shared: int, num_samples: int
) -> None:
    beginning = [5] * num_shared
    prompts = [beginning + prompt for prompt in [[3], *random_prompts(6)]]
    prompts.append(prompts[1])
    asked: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    plain, shared = (
        generate(
            model,
            prompts,
            max_new_tokens=12,
            end_id=END,
            dtype="float32",
            num_samples_per_prompt=num_samples,
            with_logprobs=True,
            share_prefix=share_prefix,
        )
        for share_prefix in (False, True)
    )
    hook.remove()
    assert shared.ids == plain.ids
    for ours, theirs in zip(shared.logprobs or [], plain.logprobs or [], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    read = [tokens for tokens in asked if tokens > num_samples * len(prompts)]
    whole = sum(map(len, prompts))
    assert read == [whole, whole - num_shared * (len(prompts) - 1)]


def test_equal_prompts_share_all_but_their_last_token(model: Transformer) -> None:
    prompts = [[5, 6, 7, 8]] * 3
    plain, shared = (
        generate(model, prompts, max_new_tokens=9, end_id=END, dtype="float32", share_prefix=share)
        for share in (False, True)
    )
    assert shared.ids == plain.ids


def test_nothing_to_do(model: Transformer) -> None:
    assert generate(model, [], max_new_tokens=5, end_id=END, dtype="float32").ids == []


@pytest.mark.parametrize("top_p", [0.9, 1.0, None])
def test_weights_out_of_bounds_are_one_line(model: Transformer, top_p: float | None) -> None:
    huge = copy.deepcopy(model)
    with torch.no_grad():
        huge.model.norm.weight.mul_(3e38)
    sampling = Sampling(temperature=1.0, top_p=top_p, seed=0, keys=[0]) if top_p else None
    with pytest.raises(UserError, match="probabilities are no numbers"):
        generate(huge, [[5, 6]], max_new_tokens=4, end_id=1, dtype="float32", sampling=sampling)
