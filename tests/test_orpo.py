"""ORPO: the equations, and that it learns preferences without a reference."""

from pathlib import Path

import numpy as np
import pytest
import torch

from minimind.datasets.batches import count, pack
from minimind.objectives.orpo import Orpo, log_odds
from minimind.objectives.preference import row_logprobs
from tests.test_training import loss_and_gradient
from tests.tiny import random_pairs, tiny_model, write_rows


def test_it_is_equations_6_and_7(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, random_pairs(3), "preference")
    batch = pack(dataset, np.arange(3), {})
    model = tiny_model()
    probabilities = row_logprobs(model, batch, "mean").detach().double().exp().numpy()
    odds = probabilities / (1 - probabilities)
    ratio = np.log(odds[0::2] / odds[1::2])
    loss = Orpo(0.3)(model, batch, 0.0)
    terms = {name: float(term.total.detach()) for name, term in loss.terms.items()}
    assert terms["nll"] == pytest.approx(-np.log(probabilities[0::2]).sum(), rel=1e-5)
    assert terms["odds_ratio"] == pytest.approx(0.3 * np.log1p(1 / np.exp(ratio)).sum(), rel=1e-5)
    assert float(loss.metrics["accuracy"].total) == (ratio > 0).sum()


@pytest.mark.parametrize("logprob", [-1e-9, -1e-6, -0.5, -5.0, -80.0])
def test_odds_are_exact_near_both_ends(logprob: float) -> None:
    exact = np.log(np.exp(np.float64(logprob)) / -np.expm1(np.float64(logprob)))
    found = log_odds(torch.tensor([logprob]))
    assert torch.isfinite(found).all()
    if logprob <= -1e-6:
        assert float(found) == pytest.approx(exact, rel=1e-3)


def test_four_micro_batches_are_one_big_batch(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, random_pairs(10), "preference")
    samples = np.arange(10)
    totals = count(dataset, samples)
    parts = [pack(dataset, samples[i : i + 3], {}) for i in (0, 3, 6, 9)]
    big = loss_and_gradient(tiny_model(), Orpo(0.5), [pack(dataset, samples, {})], totals)
    small = loss_and_gradient(tiny_model(), Orpo(0.5), parts, totals)
    assert small[0] == pytest.approx(big[0], rel=1e-6)
    torch.testing.assert_close(small[1], big[1])


def test_it_learns_which_answer_is_preferred(tmp_path: Path) -> None:
    batch = pack(write_rows(tmp_path, random_pairs(6), "preference"), np.arange(6), {})
    model = tiny_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    margins = []
    for _ in range(20):
        loss = Orpo(1.0)(model, batch, 0.0)
        margins.append(float(loss.metrics["margin"].total))
        optimizer.zero_grad()
        sum(term.total for term in loss.terms.values()).backward()
        optimizer.step()
    assert margins[-1] > margins[0] + 1
    assert float(Orpo(1.0)(model, batch, 0.0).metrics["accuracy"].total) == 6
