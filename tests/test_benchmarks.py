"""The benchmark's arithmetic, and that its plain peer does the same mathematics. No times."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from benchmarks.limit import training_operations
from benchmarks.material import END, PAD, START, Material, Row, Sizes, padded
from benchmarks.paced import Paced
from benchmarks.peers import ours
from benchmarks.peers import padded as padded_peer
from benchmarks.peers.words import words, words_tokenizer
from benchmarks.table import as_text, ratio_rows, save
from minimind.datasets.batches import Extra, in_order
from minimind.objectives.distill import Distill
from minimind.objectives.dpo import Dpo
from minimind.objectives.loss import Loss
from minimind.objectives.next_token import NextToken
from minimind.objectives.preference import row_logprobs
from tests.tiny import random_pairs, random_rows, tiny_config, tiny_model, write_rows

ROOT = Path(__file__).parents[1]


def test_ratios_are_taken_within_rounds() -> None:
    rates = {"ours": [8.0, 4.0, 2.0, 40.0], "padded": [2.0, 1.0, 1.0, 20.0], "hf": [1.0] * 4}
    rows = {row["peer"]: row for row in ratio_rows("sft", rates)}
    assert set(rows) == {"padded", "hf"}
    assert (rows["padded"]["ratio"], rows["padded"]["low"], rows["padded"]["high"]) == (3, 2, 4)
    assert rows["hf"]["ratio"] == 6
    assert rows["padded"]["theirs"] == 1.5


def test_each_setting_of_ours_has_rows_of_its_own() -> None:
    rates = {"ours": [4.0], "ours compiled": [6.0], "trl": [2.0]}
    eager, compiled = (ratio_rows("sft", rates, ours) for ours in ("ours", "ours compiled"))
    assert [(row["setting"], row["ratio"]) for row in eager] == [("eager", 2)]
    assert [(row["setting"], row["ratio"]) for row in compiled] == [("compiled", 3)]


def test_one_round_has_no_spread() -> None:
    (row,) = ratio_rows("sft", {"ours": [6.0], "trl": [2.0]})
    assert row["low"] == row["ratio"] == row["high"] == 3


def test_the_saved_table_has_its_keys(tmp_path: Path) -> None:
    rows = [{**row, "unit": "tokens/s"} for row in ratio_rows("dpo", {"ours": [9.0], "trl": [3.0]})]
    save(tmp_path / "results" / "bench.json", rows, {"threads": 2})
    found = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert found["threads"] == 2
    assert {"work", "peer", "ratio", "low", "high"} <= set(found["rows"][0])
    assert "| dpo | trl | eager | 3.00 | 3.00-3.00 | 9 | 3 | tokens/s |" in as_text(rows)


def test_ours_computes_as_stages_do_and_leaves_peers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers are measured in the same process, where one's choice would be all others'."""
    chosen = ["native"]
    monkeypatch.setattr(ours, "choose_matmuls", chosen.append)
    monkeypatch.setattr(ours, "_prepare", lambda *_: lambda: len(chosen))
    step = ours.prepare(Mock(), "sft")
    assert chosen == ["native"]
    assert step() == 2
    assert chosen == ["native", "auto", "native"]


@pytest.mark.parametrize("shape", [{}, {"head_size": 32, "qk_norm": True}])
def test_training_operations_are_six_for_each_weight_and_token(shape: dict[str, Any]) -> None:
    config = tiny_config(**shape)
    model = tiny_model(**shape)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # the head's among them
    assert training_operations(config, num_tokens=10, num_trained=10) == 6 * 10 * matrices
    head = config.vocab_size * config.hidden_size
    assert training_operations(config, num_tokens=10, num_trained=0) == 60 * (matrices - head)


def test_rows_have_the_lengths_of_real_text_and_are_the_same_for_all(tmp_path: Path) -> None:
    sizes = Sizes(dict.fromkeys(("pretrain", "sft", "dpo"), 50), 4, 2, 8, 2, 8, num_steps=8)
    materials = [Material(ROOT, tmp_path / name, sizes) for name in ("one", "other")]
    rows, others = (material.all_rows("sft") for material in materials)
    assert rows == others
    lengths = np.array([len(ids) for ids, _ in rows])
    assert 110 < lengths.mean() < 150
    assert lengths.max() <= 512
    shares = [loss_mask.count(0) / len(loss_mask) for _, loss_mask in rows]
    assert np.mean(shares) == pytest.approx(0.35, abs=0.02)
    taken = [row for step in range(8) for row in materials[0].rows_of_step("sft", step)]
    assert sorted(taken) == sorted(rows)
    pairs = materials[0].rows_of_step("dpo", 0)
    assert len(pairs) == 100
    for (chosen, loss_mask), (rejected, _) in zip(pairs[0::2], pairs[1::2], strict=True):
        context = loss_mask.index(1)
        assert chosen[:context] == rejected[:context]
        assert chosen[context:] != rejected[context:]


def test_words_become_the_tokens_they_are_made_of() -> None:
    ids = [START, 10, 3, 6399, 120, 21, END]
    tokenizer = words_tokenizer(6400)
    assert tokenizer(words(ids), add_special_tokens=False).input_ids == ids
    assert tokenizer.pad_token_id == PAD and tokenizer.eos_token_id == END


def test_padding_trains_on_the_same_tokens() -> None:
    rows: list[Row] = [([7, 8, 9], [0, 1, 1]), ([5, 6], [0, 1])]
    ids, labels = padded(rows, 4)
    assert ids.tolist() == [[7, 8, 9, 0], [5, 6, 0, 0]]
    assert labels.tolist() == [[-100, 8, 9, -100], [-100, 6, -100, -100]]


def total(loss: Loss, num_tokens: int, num_samples: int) -> float:
    counts = {"tokens": num_tokens, "samples": num_samples, "rows": num_samples}
    return sum(float(term.total) / counts[term.per] for term in loss.terms.values())


@torch.no_grad()
def test_the_padded_peers_losses_are_ours(tmp_path: Path) -> None:
    model, other = tiny_model(0).eval(), tiny_model(1).eval()
    theirs, their_other = (padded_peer.llama(m).eval() for m in (model, other))
    rows = random_rows(6)
    rows = [(ids, [min(c, 1) for c in loss_mask]) for ids, loss_mask in rows]
    (batch,) = in_order(write_rows(tmp_path / "rows", rows), np.arange(6), 6, {})
    ours = NextToken()(model, batch, 0.0)
    expected = float(padded_peer.next_token_loss(theirs, rows))
    assert total(ours, batch.counts.tokens, 6) == pytest.approx(expected, abs=1e-5)

    distilled = Distill(0.3, 1.5, other)(model, batch, 0.0)
    expected = float(padded_peer.distill_loss(theirs, their_other, rows, 0.3, 1.5))
    assert total(distilled, batch.counts.tokens, 6) == pytest.approx(expected, abs=1e-5)

    pairs = random_pairs(4)
    dataset = write_rows(tmp_path / "pairs", pairs, format="preference")
    (plain,) = in_order(dataset, np.arange(4), 4, {})
    reference = row_logprobs(other, plain, "sum").numpy()
    (batch,) = in_order(dataset, np.arange(4), 4, {"reference": Extra(reference, per="rows")})
    ours = Dpo(0.1, "sum", 0.0)(model, batch, 0.0)
    expected = float(padded_peer.dpo_loss(theirs, their_other, pairs, 0.1))
    assert total(ours, batch.counts.tokens, 4) == pytest.approx(expected, abs=1e-5)


def test_a_foreign_loop_makes_one_step_at_a_time() -> None:
    done: list[int] = []

    def loop(wait) -> None:  # type: ignore[no-untyped-def]
        for number in range(3):
            wait()
            done.append(number)

    paced = Paced(loop)
    assert done == []
    paced.step()
    assert done == [0]
    paced.step()
    assert done == [0, 1]
    with pytest.raises(RuntimeError, match="ended before the measurement"):
        paced.step()


def test_a_foreign_loops_error_is_told() -> None:
    def loop(wait) -> None:  # type: ignore[no-untyped-def]
        wait()
        raise KeyError("theirs")

    paced = Paced(loop)
    with pytest.raises(KeyError, match="theirs"):
        paced.step()
