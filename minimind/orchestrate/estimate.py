"""What stages that train take: parameters, tokens, FLOPs and memory, from parameters and data.

docs/plan.md explains the arithmetic. Data that was encoded nowhere yet counts by its bounds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from minimind.chat.tokenizer import num_tokens, read_tokenizer
from minimind.datasets.epochs import num_steps
from minimind.datasets.sources import count_rows
from minimind.model.checkpoint import load_config
from minimind.model.transformer import FILL, ModelConfig, Transformer
from minimind.objectives.chunked import MANY_LOGITS
from minimind.params import SHARED, Section
from minimind.reinforcement.config import ReinforcementConfig
from minimind.training.fit import FitConfig

# The section and the encoded data of each stage that trains; "": the section says which.
TRAINED = {
    "pretrain": ("pretrain", "pretrain"),
    "sft": ("sft", "sft"),
    "dpo": ("dpo", "dpo"),
    "reward": ("reward", "dpo"),
    "reason": ("reason", "reason"),
    "distill": ("distill", ""),
    "baseline": ("distill", ""),
    "lora": ("lora", ""),
    "grpo": ("grpo", "reason"),  # prompts and completions as long as those of its start
    "spo": ("spo", "reason"),
}
REINFORCED = ("grpo", "spo")
MIB = 2**20
# Measured on x86-64 Linux with PyTorch 2.13: what training nothing takes, and peft; gaps between
# blocks of memory, more of them where hardly any size returns.
PROCESS, PEFT, CUDA_CONTEXT = 425 * MIB, 80 * MIB, 600 * MIB
GAPS, GAPS_REINFORCED, GAPS_CUDA = 1.2, 1.9, 1.1
# oneDNN keeps what it prepared for the last sizes of matmuls: those of a layer and of the head,
# forward and backward; so many bytes each, and so many for each value of the matmul's input.
LAYER_MATMULS, ADAPTER_MATMULS, HEAD_MATMULS = 12, 15, 3
PREPARED, PREPARED_VALUE, MOST_PREPARED, MOST_PREPARED_REINFORCED = 0.35 * MIB, 1.2, 1024, 64
LOGIT_BYTES, CHUNKED_LOGIT_BYTES = 18, 8  # logits, their softmax and gradients of both
NEWTON_SCHULZ_STEPS = 5
# Kernels that training starts for each tensor of the model and micro-batch, counted as operations
# of PyTorch; Muon's, for each matrix and step. From Python none is started in less than about 5 us:
# a GPU waits for that where the model is small. Assumed: no GPU was measured.
KERNELS, MUON_KERNELS, FORWARD_SHARE = 14, 4, 1 / 3
LAUNCH_SECONDS = 5e-6
# Deviations of the numbers of a row's tokens, as shares of their means, where only these are known:
# about those of the built-in chats.
DEVIATION, TRAINED_DEVIATION = 0.25, 0.5


@dataclass(frozen=True)
class Data:
    """How many samples there are, and means and deviations of the numbers of a row's tokens."""

    samples: int
    rows_per_sample: int
    tokens: float
    deviation: float = 0.0
    trained: float = 0.0
    trained_deviation: float = 0.0

    @classmethod
    def encoded(cls, folder: Path, rows_per_sample: int) -> "Data":
        """Of a folder that stage encode has written."""
        tokens, trained = (
            np.diff(np.fromfile(folder / name, np.int64))
            for name in ("offsets.bin", "trained_offsets.bin")
        )
        moments = (tokens.mean(), tokens.std(), trained.mean(), trained.std())
        return cls(len(tokens) // rows_per_sample, rows_per_sample, *map(float, moments))

    @classmethod
    def counted(cls, metrics: Path, rows_per_sample: int) -> "Data":
        """Of the metrics of stage encode, which git has where the data itself is missing."""
        (counts,) = json.loads(metrics.read_text(encoding="utf-8"))["encode"].values()
        samples = counts["samples"]
        tokens = counts["tokens"] / (samples * rows_per_sample)
        trained = tokens * counts["trained_share"]
        deviations = (tokens * DEVIATION, trained * TRAINED_DEVIATION)
        return cls(samples, rows_per_sample, tokens, deviations[0], trained, deviations[1])


@dataclass(frozen=True)
class Estimate:
    """What training takes."""

    stage: str
    config: Mapping[str, Any]  # its section with all defaults
    shape: ModelConfig
    data: Data
    on_cpu: bool = True
    beside: float = 0.0  # bytes of data that it maps into memory

    @cached_property
    def _sizes(self) -> dict[str, torch.Size]:
        """Shapes of the model's parameters, by name."""
        with torch.device("meta"):
            return {name: p.shape for name, p in Transformer(self.shape).named_parameters()}

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self._sizes.values()))

    @property
    def _matrices(self) -> dict[str, torch.Size]:
        """Of those inside layers, which Muon trains."""
        return {n: size for n, size in self._sizes.items() if ".layers." in n and len(size) == 2}

    @cached_property
    def trained(self) -> int:
        """Parameters that are trained: of an adapter, its own alone."""
        if self.stage != "lora":
            return self.parameters
        sizes = {name.split(".")[-2]: size for name, size in self._matrices.items()}
        each = sum(sum(sizes[name]) for name in self.config["projections"])
        return int(self.config["rank"] * each * self.shape.num_layers)

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return int(self.config["batch_size"] * self.data.rows_per_sample * self._completions)

    @property
    def _completions(self) -> int:
        return int(self.config.get("num_generations", 1))

    @property
    def steps(self) -> int:
        c = self.config
        samples = math.floor(self.data.samples * (1 - c.get("validation_share", 0)))
        per_step = c["batch_size"] * c["accumulation_steps"]
        return num_steps(c["epochs"], samples, per_step, c["max_steps"])

    @property
    def tokens(self) -> float:
        """That all steps compute, trained on or not."""
        return self.steps * self.rows * self.config["accumulation_steps"] * self.data.tokens

    @property
    def flops(self) -> float:
        s, data = self.shape, self.data
        head = s.vocab_size * s.hidden_size
        expert = 3 * s.hidden_size * s.intermediate_size
        idle = max(0, s.num_experts - s.num_experts_per_token) * expert  # what a token goes past
        attention = s.num_heads * s.head_size * data.tokens
        # An embedding is looked up, which costs nothing.
        layers = self.parameters - head * (2 - s.tie_embeddings) + s.num_layers * (attention - idle)
        # A parameter and token: 2 forward, 4 backward, 2 of them for its own gradient; rollouts
        # sample and are scored by the reference, too.
        passes = 4 if self.stage == "lora" else 10 if self.stage in REINFORCED else 6
        flops = passes * self.tokens * (layers + head * data.trained / data.tokens)
        if self.config["optimizer"] == "muon":
            flops += self.steps * sum(map(_orthogonalizing, self._matrices.values()))
        return flops

    @property
    def kernels(self) -> float:
        """That a step starts on a GPU."""
        passes = float(self.config["accumulation_steps"])
        if self.stage in REINFORCED:  # a forward pass for each token that is sampled
            sampled = min(self.data.trained, self.config["max_new_tokens"])
            passes += FORWARD_SHARE * sampled
        by_muon = len(self._matrices) if self.config["optimizer"] == "muon" else 0
        return KERNELS * len(self._sizes) * passes + MUON_KERNELS * by_muon

    @property
    def least_seconds(self) -> float:
        """On a GPU, however fast it is."""
        return self.steps * self.kernels * LAUNCH_SECONDS

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes by what they are for."""
        s, c, reinforced = self.shape, self.config, self.stage in REINFORCED
        tokens, token_sizes = self._micro_batch(self.data.tokens, self.data.deviation)
        scored, scored_sizes = self._micro_batch(self.data.trained, self.data.trained_deviation)
        width = 4 if c["dtype"] == "float32" else 2
        chosen = s.num_experts_per_token if s.num_experts else 0
        forwards = chosen + s.num_shared_experts if s.num_experts else 1  # feed-forward, of a token
        # In bytes, of a token: norms and the residual stream, always in float32; then attention's
        # inputs, q, k, v and output; inputs and four inner values of feed-forwards; chosen outputs.
        layer = 16 * s.hidden_size
        layer += 8 * s.qk_norm * (s.num_heads + s.num_kv_heads) * s.head_size
        layer += width * (3 * s.hidden_size + 2 * (s.num_heads + s.num_kv_heads) * s.head_size)
        layer += width * forwards * (2 * s.hidden_size + 4 * s.intermediate_size)
        layer += width * chosen * s.hidden_size
        layers = layer * s.num_layers
        if c.get("gradient_checkpointing"):
            layers = layer + 4 * s.hidden_size * s.num_layers
        logits = 0 if self.stage == "reward" else scored * s.vocab_size
        is_chunked = self.on_cpu and logits > MANY_LOGITS
        by_muon = sum(map(math.prod, self._matrices.values())) if c["optimizer"] == "muon" else 0
        gaps = GAPS_CUDA if not self.on_cpu else GAPS_REINFORCED if reinforced else GAPS
        matmuls = LAYER_MATMULS + (ADAPTER_MATMULS if self.stage == "lora" else 0)
        prepared = min(
            matmuls * token_sizes + HEAD_MATMULS * scored_sizes,
            MOST_PREPARED_REINFORCED if reinforced else MOST_PREPARED,
        )
        return {
            "process": (PROCESS if self.on_cpu else CUDA_CONTEXT)
            + (PEFT if self.stage == "lora" and self.on_cpu else 0),
            "data": self.beside if self.on_cpu else 0.0,
            "weights": (4 + 4 * reinforced) * self.parameters + width % 4 * self.parameters,
            "gradients": 4.0 * self.trained,
            "optimizer": 8.0 * self.trained - 4.0 * min(by_muon, self.trained),
            "activations": gaps * layers * tokens,
            "logits": gaps * logits * (CHUNKED_LOGIT_BYTES if is_chunked else LOGIT_BYTES),
            "matmuls": self.on_cpu
            * prepared
            * (PREPARED + PREPARED_VALUE * tokens * s.hidden_size),
        }

    @property
    def disk(self) -> float:
        """Bytes of the checkpoint, and of two to resume from while it trains."""
        return 4.0 * self.trained + 2 * (4 * self.trained + self.memory["optimizer"])

    @property
    def peak(self) -> float:
        """Bytes: gradients grow while activations go, so that the larger of them counts."""
        m = self.memory
        passing = m["activations"] + m["logits"]
        return sum(m.values()) - min(passing, m["gradients"])

    def _micro_batch(self, mean: float, deviation: float) -> tuple[float, float]:
        """Tokens of a large micro-batch, and how many sizes there are, of multiples of FILL."""
        deviation *= math.sqrt(self.rows)
        return self.rows * mean + 3 * deviation, min(1 + 6 * deviation / FILL, self.steps)


class Estimates:
    """Estimates of the stages of a project with some parameters."""

    def __init__(
        self,
        root: Path,
        params: Mapping[str, Any],
        encoded_with: Mapping[str, Any],
        on_cpu: bool = True,
    ) -> None:
        """encoded_with: the parameters with which the encoded data was made."""
        self.root, self.params, self.on_cpu = root, params, on_cpu
        self.encoded_with = encoded_with

    def of(self, stage: str) -> Estimate:
        """Of a stage in TRAINED.

        Raises:
            UserError, LookupError, TypeError, ValueError, OSError: a parameter or file is not as
                the stage wants it.
        """
        section, data = TRAINED[stage]
        sections: list[type[Section]] = [ReinforcementConfig if stage in REINFORCED else FitConfig]
        if stage == "lora":
            from minimind.model.lora import AdapterShape  # slow: it imports transformers

            sections.append(AdapterShape)
        defaults = {k: f.get_default() for s in sections for k, f in s.model_fields.items()}
        own = {key: value for key, value in self.params[section].items() if value is not None}
        shared = {key: self.params[key] for key in SHARED}
        config = defaults | shared | own
        name = data or config["data"]
        found, beside = self.data(name)
        if stage in REINFORCED:
            found = replace(found, samples=self.num_rows("prompts"))
        if section == "distill":
            scored = found.samples * found.trained
            beside += scored * (4 * self.params["teacher_outputs"]["top_k"] + 2)
        return Estimate(stage, config, self.shape(stage), found, self.on_cpu, beside)

    def shape(self, stage: str) -> ModelConfig:
        """Of the model that a stage trains, which most have from what they start from."""
        section = TRAINED[stage][0]
        init = self.params[section]["init"]
        if stage != "pretrain" and section != "distill":
            above = PurePosixPath(init).name
            is_made = init == f"models/{above}" and above in TRAINED
            return self.shape(above) if is_made else load_config(self.root / init)
        own = self.params["model"] if stage == "pretrain" else self.params["distill"]["student"]
        return ModelConfig(vocab_size=self.vocab_size(), **own)

    def vocab_size(self) -> int:
        encoded_with, learnt_from = (
            self.params["encode"]["tokenizer"],
            self.params["data"]["tokenizer"],
        )
        extend = self.params["tokenizer"].get("extend", ())
        for path in (encoded_with, learnt_from):
            if path != "models/tokenizer" and (self.root / path).is_dir():
                more = extend if path == learnt_from else ()
                return num_tokens(read_tokenizer(self.root / path, more))
        return int(self.params["tokenizer"]["vocab_size"]) + len(extend)

    def data(self, name: str) -> tuple[Data, float]:
        """Rows of an encoded data set, and its bytes."""
        folder = self.root / "data/encoded" / name
        rows_per_sample = 2 if name == "dpo" else 1
        sources = [params.get("data", {}).get(name) for params in (self.params, self.encoded_with)]
        is_here = (folder / "meta.json").is_file()
        metrics = self.root / "metrics/encode" / f"{name}.json"
        if (is_here or metrics.is_file()) and sources[0] == sources[1]:
            data = (
                Data.encoded(folder, rows_per_sample)
                if is_here
                else Data.counted(metrics, rows_per_sample)
            )
            if sources[0] == f"data/mini_world/{name}.jsonl":
                now, then = (
                    p["mini_world"][f"num_{name}"] for p in (self.params, self.encoded_with)
                )
                data = replace(data, samples=data.samples * now // then)
            return data, 3.0 * data.samples * rows_per_sample * data.tokens
        most = float(self.params["encode"][name]["max_length"])
        return Data(self.num_rows(name), rows_per_sample, most, trained=most), 0.0

    def num_rows(self, name: str) -> int:
        """Rows of a source of data, or that the built-in one will have."""
        source = self.root / self.params["data"][name]
        if not source.exists() and source == self.root / f"data/mini_world/{name}.jsonl":
            return int(self.params["mini_world"][f"num_{name}"])
        return count_rows(source)


def _orthogonalizing(size: torch.Size) -> float:
    """FLOPs of Muon's iteration for a matrix."""
    short, long = sorted(size)
    return NEWTON_SCHULZ_STEPS * (4.0 * short**2 * long + 2.0 * short**3)
