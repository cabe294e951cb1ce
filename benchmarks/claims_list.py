"""What each stage is claimed to teach, as inequalities that a run keeps or breaks."""

import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What a run has measured."""

    metrics: dict[str, Any]  # by stage or checkpoint, training and evaluation apart
    predictions: dict[str, list[Prediction]]  # by checkpoint, in the order of the problems

    @classmethod
    def read(cls, project: Path) -> "Results":
        metrics: dict[str, Any] = {}
        for part, files in {
            "training": (project / "metrics").glob("*.json"),
            "evaluation": (project / "metrics" / "evaluate").glob("*.json"),
        }.items():
            for file in sorted(files):
                metrics.setdefault(part, {}).update(json.loads(file.read_text(encoding="utf-8")))
        params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
        num_pairs = json.loads((project / "metrics" / "encode" / "dpo.json").read_text())
        metrics["held_out_pairs"] = math.floor(
            num_pairs["encode"]["dpo"]["samples"] * params["dpo"]["validation_share"]
        )
        predictions = {
            file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in sorted((project / "predictions").glob("*.jsonl"))
            if file.stem in metrics["evaluation"]
        }
        return cls(metrics, predictions)


class Margin(NamedTuple):
    """How far inside a claim's limit a run is, and how far the choice of problems can move it."""

    distance: float  # 0 or more: the claim holds
    standard_error: float  # of the distance, over choices of as many problems; 0 if it has none

    @property
    def holds(self) -> bool:
        return self.distance >= 0

    @property
    def sigmas(self) -> float | None:
        """Distance in standard errors: 3.1 is a chance of 1 in 1,000 to lie outside."""
        return self.distance / self.standard_error if self.standard_error else None


@dataclass(frozen=True)
class Claim:
    """An inequality about a run's results."""

    name: str
    margin: Callable[[Results], Margin]


def level(number: int) -> Callable[[Prediction], bool]:
    return lambda row: row["task"] is None and row["level"] == number


def stories(row: Prediction) -> bool:
    return row["task"] is None


def task(name: str) -> Callable[[Prediction], bool]:
    return lambda row: row["task"] == name


def answers(
    results: Results, checkpoint: str, where: Callable[[Prediction], bool]
) -> list[Prediction]:
    return [row for row in results.predictions[checkpoint] if where(row)]


def of_sample(distances: Sequence[float], problems: Sequence[str]) -> Margin:
    """The mean of a distance over answers, with its error over choices of the problems.

    Answers to one problem are no independent draws, so deviations are summed within a problem
    before they are squared (a cluster-robust error; of one answer each, the usual one).
    """
    center = mean(distances)
    deviations: dict[str, float] = defaultdict(float)
    for distance, problem in zip(distances, problems, strict=True):
        deviations[problem] += distance - center
    num = len(deviations)
    spread = sum(deviation**2 for deviation in deviations.values()) * num / (num - 1)
    return Margin(center, math.sqrt(spread) / len(distances))


def over_answers(
    checkpoint: str,
    where: Callable[[Prediction], bool],
    distance: Callable[[Prediction], float],
) -> Callable[[Results], Margin]:
    def margin(r: Results) -> Margin:
        rows = answers(r, checkpoint, where)
        return of_sample([distance(row) for row in rows], [row["problem"] for row in rows])

    return margin


def at_least(
    limit: float, checkpoint: str, where: Callable[[Prediction], bool], what: str = "correct"
) -> Callable[[Results], Margin]:
    return over_answers(checkpoint, where, lambda row: row[what] - limit)


def at_most(
    limit: float, checkpoint: str, where: Callable[[Prediction], bool], what: str = "correct"
) -> Callable[[Results], Margin]:
    return over_answers(checkpoint, where, lambda row: limit - row[what])


def above(
    limit: float,
    better: str,
    worse: str,
    where: Callable[[Prediction], bool],
    factor: float = 1.0,
) -> Callable[[Results], Margin]:
    """better - factor * worse is at least the limit, answer by answer."""

    def margin(r: Results) -> Margin:
        pairs = list(zip(answers(r, better, where), answers(r, worse, where), strict=True))
        assert all(b["id"] == w["id"] for b, w in pairs), "the same problems in the same order"
        return of_sample(
            [b["correct"] - factor * w["correct"] - limit for b, w in pairs],
            [b["problem"] for b, _ in pairs],
        )

    return margin


def within(
    limit: float, one: str, other: str, where: Callable[[Prediction], bool]
) -> Callable[[Results], Margin]:
    """Neither is more than the limit above the other."""

    def margin(r: Results) -> Margin:
        difference = above(0.0, one, other, where)(r)
        return Margin(limit - abs(difference.distance), difference.standard_error)

    return margin


def pair_accuracy(limit: float) -> Callable[[Results], Margin]:
    def margin(r: Results) -> Margin:
        share, num = r.metrics["training"]["dpo"]["pair_accuracy"], r.metrics["held_out_pairs"]
        return Margin(share - limit, math.sqrt(share * (1 - share) / num))

    return margin


def metric(function: Callable[[dict[str, Any]], float]) -> Callable[[Results], Margin]:
    """A number of the training metrics that must not be below 0."""
    return lambda r: Margin(function(r.metrics["training"]), 0.0)


CLAIMS = [
    Claim(
        "pretrain: the right result is the likeliest of four more often than by chance",
        at_least(0.25, "pretrain", task("equation"), "choice_correct"),
    ),
    Claim(
        "pretrain: loss on held-out rows falls",
        metric(lambda m: m["pretrain"]["initial_val_loss"] - m["pretrain"]["val_loss"]),
    ),
    Claim("sft: .95 of answers in its form", at_least(0.95, "sft", stories, "in_form")),
    Claim("sft: level 1 five times pretrain's", above(0.0, "sft", "pretrain", level(1), 5.0)),
    Claim("dpo: at most .70 full sentences before", at_most(0.70, "sft", stories, "full_sentence")),
    Claim("dpo: .95 full sentences after", at_least(0.95, "dpo", stories, "full_sentence")),
    Claim("dpo: level 1 within 2 points of sft's", within(0.02, "dpo", "sft", level(1))),
    Claim("dpo: pair accuracy .90", pair_accuracy(0.90)),
    *(
        Claim(
            f"reason: level {number} at least {limit:.2f}", at_least(limit, "reason", level(number))
        )
        for number, limit in ((1, 0.95), (2, 0.95), (3, 0.90))
    ),
    Claim("reason: .98 complete thoughts", at_least(0.98, "reason", stories, "complete_think")),
    *(
        claim
        for name in ("grpo", "spo")
        for claim in (
            Claim(
                f"{name}: level 4 10 points over reason's", above(0.10, name, "reason", level(4))
            ),
            *(
                Claim(
                    f"{name}: level {number} no 2 points below reason's",
                    above(-0.02, name, "reason", level(number)),
                )
                for number in (1, 2, 3)
            ),
        )
    ),
    Claim("lora: at most .20 of its task before", at_most(0.20, "sft", task("extraction"))),
    Claim("lora: .60 of its task after", at_least(0.60, "lora", task("extraction"))),
    Claim(
        "distill: nearer its teacher than the student without one",
        metric(lambda m: m["baseline"]["kl_to_teacher"] - m["distill"]["kl_to_teacher"]),
    ),
    Claim("distill: better at the task than it", above(0.0, "distill", "baseline", stories)),
]


def untouched(project: Path) -> bool:
    """Whether the adapter's base has the bytes that DVC recorded for it when sft had ended."""
    dvc = [sys.executable, "-m", "dvc", "status", "-q", "sft"]
    return subprocess.run(dvc, cwd=project, check=False).returncode == 0


def merged_equals_adapter(project: Path) -> bool:
    """Whether base and adapter, put together by peft, say what the merged checkpoint says."""
    base = AutoModelForCausalLM.from_pretrained(project / "models" / "sft")
    adapted = PeftModel.from_pretrained(base, str(project / "models" / "lora"))
    merged = AutoModelForCausalLM.from_pretrained(project / "exports" / "lora")
    ids = torch.randint(base.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-3, rtol=0.0)
