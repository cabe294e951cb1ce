"""Objectives, schedules and the loop: the mathematics, and that nothing depends on the packing."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimind.datasets.batches import Batches, Extra, count, pack, split_samples
from minimind.datasets.epochs import exact
from minimind.objectives import chunked
from minimind.objectives.dpo import Dpo
from minimind.objectives.loss import token_logprobs
from minimind.objectives.next_token import NextToken
from minimind.objectives.preference import row_logprobs
from minimind.training.muon import Muon
from minimind.training.schedule import lr_factor, never_reached
from tests.tiny import random_pairs, random_rows, tiny_model, write_rows


def test_the_documents_schedule_starts_above_the_rate() -> None:
    assert 5e-4 * lr_factor("minimind_cosine", 0, 10, 0) == pytest.approx(0.00055)


def test_the_documents_five_rates() -> None:
    # The second notebook counts steps from 1: steps 1..5 of 5.
    rates = [5e-4 * lr_factor("minimind_cosine", k, 5, 0) for k in range(1, 6)]
    assert rates == pytest.approx(
        [0.00050225, 0.00037725, 0.00022275, 0.00009775, 0.00005], abs=5e-9
    )


@pytest.mark.parametrize("name", ["minimind_cosine", "cosine", "linear", "step", "constant"])
def test_warmup_rises_to_the_schedules_start_and_never_stands_still(name) -> None:
    rates = [lr_factor(name, k, 100, 10) for k in range(100)]
    assert rates[0] > 0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == pytest.approx(lr_factor(name, 10, 100, 10))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] > 0


@pytest.mark.parametrize("name", ["minimind_cosine", "cosine", "linear", "step", "constant"])
def test_a_warm_up_is_warned_of_if_and_only_if_no_step_has_all_of_lr(name) -> None:
    for num_steps in (1, 4, 20):
        for warmup_steps in range(2 * num_steps + 2):
            highest = max(lr_factor(name, k, num_steps, warmup_steps) for k in range(num_steps))
            assert (never_reached(name, warmup_steps, num_steps) is not None) == (highest < 1)


def test_step_schedule_falls_tenfold_at_half_and_three_quarters() -> None:
    rates = [lr_factor("step", k, 100, 0) for k in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_and_linear_end_where_they_say() -> None:
    assert lr_factor("cosine", 100, 100, 0) == pytest.approx(0.1)
    assert lr_factor("linear", 100, 100, 0) == pytest.approx(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_many_scores_give_the_same_bits_a_few_rows_at_a_time(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (4 * torch.randn(50, 300, generator=generator)).to(dtype)
    targets = torch.randint(0, 300, (50,), generator=generator)
    weights = torch.randn(50, generator=generator)
    results = []
    for many_logits in (scores.numel(), scores.numel() - 1):
        monkeypatch.setattr(chunked, "MANY_LOGITS", many_logits)
        monkeypatch.setattr(chunked, "LOGITS_AT_A_TIME", 7 * 300)
        leaf = scores.clone().requires_grad_()
        logprobs = token_logprobs(leaf, targets, temperature)
        (logprobs * weights).sum().backward()
        results.append((type(logprobs.grad_fn).__name__, logprobs, leaf.grad))
    (plain, expected, expected_grad), (parted, found, found_grad) = results
    assert plain != parted
    assert torch.equal(found, expected)
    assert torch.equal(found_grad, expected_grad)
    assert found.dtype == torch.float32
    exact = (scores.double() / temperature).log_softmax(1)[torch.arange(50), targets]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def loss_and_gradient(model, objective, batches, totals) -> tuple[float, torch.Tensor]:
    total = torch.zeros(())
    for batch in batches:
        terms = objective(model, batch, 0.0).terms.values()
        part = sum(term.total / getattr(totals, term.per) for term in terms)
        part.backward()
        total += part.detach()
    return float(total), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["next_token", "dpo"])
def test_four_micro_batches_are_one_big_batch(tmp_path: Path, kind: str) -> None:
    if kind == "dpo":
        dataset = write_rows(tmp_path, random_pairs(10), "preference")
        values = np.random.default_rng(0).normal(-20, 3, dataset.rows).astype(np.float32)
        extras = {"reference": Extra(values, per="rows")}
        objective = Dpo(beta=0.1, reduction="sum", nll_weight=1.0)
    else:
        dataset, extras = write_rows(tmp_path, random_rows(10)), {}
        objective = NextToken(tag_weight=10.0, final_tag_weight=5.0)
    samples = np.arange(10)
    totals = count(dataset, samples)
    parts = [pack(dataset, samples[i : i + 3], extras) for i in (0, 3, 6, 9)]
    assert len(parts) == 4
    big = loss_and_gradient(tiny_model(), objective, [pack(dataset, samples, extras)], totals)
    small = loss_and_gradient(tiny_model(), objective, parts, totals)
    assert small[0] == pytest.approx(big[0], rel=1e-6)
    torch.testing.assert_close(small[1], big[1])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_dpo_starts_at_log_2_with_no_margin(tmp_path: Path, reduction) -> None:
    dataset = write_rows(tmp_path, random_pairs(6), "preference")
    model = tiny_model()
    with torch.no_grad():
        reference = row_logprobs(model, pack(dataset, np.arange(6), {}), reduction).numpy()
    batch = pack(dataset, np.arange(6), {"reference": Extra(reference, per="rows")})
    loss = Dpo(0.1, reduction, 0.0)(model, batch, 0.0)
    assert float(loss.terms["dpo"].total.detach()) / 6 == pytest.approx(math.log(2), abs=1e-7)
    assert float(loss.metrics["margin"].total) == 0.0


def test_dpo_is_equation_7(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, random_pairs(3), "preference")
    reference = np.array([-9.0, -8.0, -7.0, -11.0, -5.0, -6.0], dtype=np.float32)
    batch = pack(dataset, np.arange(3), {"reference": Extra(reference, per="rows")})
    model = tiny_model()
    log_pi = row_logprobs(model, batch, "sum").detach().double().numpy()
    margins = (log_pi[0::2] - reference[0::2]) - (log_pi[1::2] - reference[1::2])
    expected = np.log1p(np.exp(-0.3 * margins)).sum()
    loss = Dpo(0.3, "sum", 0.0)(model, batch, 0.0)
    assert float(loss.terms["dpo"].total.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_chosen_answers_have_a_loss_of_their_own(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, random_pairs(3), "preference")
    reference = np.zeros(6, dtype=np.float32)
    batch = pack(dataset, np.arange(3), {"reference": Extra(reference, per="rows")})
    model = tiny_model()
    terms = Dpo(0.1, "sum", nll_weight=0.5)(model, batch, 0.0).terms
    chosen = row_logprobs(model, batch, "mean")[0::2]
    torch.testing.assert_close(terms["nll"].total, -0.5 * chosen.sum())
    assert set(Dpo(0.1, "sum", nll_weight=0.0)(model, batch, 0.0).terms) == {"dpo"}


def test_tags_weigh_more_and_the_denominator_does_not(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, random_rows(5))
    batch = pack(dataset, np.arange(5), {})
    assert 0 < int(batch.is_tag.sum()) < len(batch.targets)
    model = tiny_model()
    plain = NextToken()(model, batch, 0.0)
    tags_only = replace(batch, targets=batch.targets, is_tag=~batch.is_tag)
    heavy = NextToken(10.0, 10.0)(model, batch, 0.0)
    others = NextToken(10.0, 10.0)(model, tags_only, 0.0)
    # tags ten times + others ten times = eleven times the plain sum
    together = heavy.terms["next_token"].total + others.terms["next_token"].total
    torch.testing.assert_close(together, 11 * plain.terms["next_token"].total)
    assert heavy.terms["next_token"].per == "tokens"
    assert batch.counts.tokens == len(batch.targets)


def test_the_tag_weight_moves_linearly(tmp_path: Path) -> None:
    batch = pack(write_rows(tmp_path, random_rows(5)), np.arange(5), {})
    model = tiny_model()

    def loss(objective: NextToken, progress: float) -> torch.Tensor:
        return objective(model, batch, progress).terms["next_token"].total.detach()

    moving = NextToken(10.0, 5.0)
    torch.testing.assert_close(loss(moving, 0.0), loss(NextToken(10.0, 10.0), 0.0))
    torch.testing.assert_close(loss(moving, 0.5), loss(NextToken(7.5, 7.5), 0.0))
    torch.testing.assert_close(loss(moving, 1.0), loss(NextToken(5.0, 5.0), 0.0))


def make_batches(tmp_path: Path, **changes) -> Batches:
    dataset = write_rows(tmp_path, random_rows(23))
    values = {
        "batch_size": 4,
        "accumulation_steps": 2,
        "epochs": 2.5,
        "max_steps": 0,
        "seed": 1,
    }
    return Batches(dataset, np.arange(23), extras={}, **(values | changes))


def test_an_epoch_takes_every_sample_once_the_last_smaller_step_too(tmp_path: Path) -> None:
    batches = make_batches(tmp_path)
    assert batches.steps_per_epoch == 3
    assert batches.num_steps == 3 + 3 + 2
    for epoch in (0, 1):
        samples = [s for k in range(3) for s in batches.samples_of(3 * epoch + k)]
        assert sorted(samples) == list(range(23))
    assert list(batches.samples_of(0)) != list(batches.samples_of(3))
    assert len(batches.samples_of(2)) == 7
    assert make_batches(tmp_path, max_steps=4).num_steps == 4


@pytest.mark.parametrize("world", [2, 3])
def test_processes_divide_a_step_and_agree_on_its_size(tmp_path: Path, world: int) -> None:
    batches = make_batches(tmp_path)
    for k in range(batches.num_steps):
        shares = [batches.step(k, rank, world) for rank in range(world)]
        assert len({len(share.micro_batches) for share in shares}) == 1  # they compute in step
        counted = [b for share in shares for b in share.micro_batches if b.weight]
        assert sorted(int(r) for b in counted for r in b.rows) == sorted(batches.samples_of(k))
        counts = [b.counts for b in counted]
        assert {share.totals for share in shares} == {
            type(counts[0])(*(sum(values) for values in zip(*counts, strict=True)))
        }


def test_the_share_is_of_source_rows_and_exact() -> None:
    train, held_out = split_samples(np.arange(101), 0.29, seed=4, copies=0)
    assert len(held_out) == 29  # the float product is below 29
    assert sorted([*train, *held_out]) == list(range(100))
    train, held_out = split_samples(np.arange(0, 301, 3), 0.29, seed=4, copies=0)
    assert (len(train), len(held_out)) == (3 * 71, 3 * 29)


@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=40),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
    copies=st.integers(0, 3),
)
def test_a_source_row_lies_on_one_side_of_the_split(
    pieces: list[int], share: float, seed: int, copies: int
) -> None:
    """Texts of some pieces each; or, with copies, chats with their variations."""
    sizes = [(1 + copies) * number for number in pieces]
    sources = np.cumsum([0, *sizes])
    train, held_out = split_samples(sources, share, seed, copies)
    source_of_sample = np.repeat(np.arange(len(sizes)), sizes)
    trained, validated = set(source_of_sample[train]), set(source_of_sample[held_out])
    assert trained | validated == set(range(len(sizes)))
    assert not trained & validated
    assert len(validated) == math.floor(exact(share) * len(sizes))
    # All of a row that is trained on; the originals of one that is validated on, which come first.
    assert train.tolist() == [s for s, row in enumerate(source_of_sample) if row in trained]
    assert held_out.tolist() == [
        sources[row] + k for row in sorted(validated) for k in range(pieces[row])
    ]


def test_muon_in_batches_is_pytorchs_muon() -> None:
    torch.manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 16), (8, 8), (12, 4)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [
        Muon(ours, dtype=torch.bfloat16, **settings),
        torch.optim.Muon(theirs, **settings),
    ]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            # The iteration is in bfloat16: products of other shapes round differently.
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
