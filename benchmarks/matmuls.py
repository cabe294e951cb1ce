"""How fast 16-bit matmuls in float32 are: python -m benchmarks.matmuls

Training steps and decoding at the sizes of params.yaml, each form in a process of its own:

native       bfloat16, by this processor's instructions where it has them
in float32   bfloat16, by float32's instructions (MINIMIND_CPU_MATMULS=float32)
scalar       bfloat16 as PyTorch computes it where oneDNN has no instructions for it, which
             ONEDNN_MAX_CPU_ISA=AVX2 makes it believe; x86 alone
float32      all in float32

The forms take turns, and a ratio is one of the same round: what slows down the machine for a
while cancels.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.material import write_rows
from benchmarks.peers.ours import CPU, bare_run
from benchmarks.table import quartiles
from minimind.compute.matmuls import choose_matmuls, matmuls_in_float32
from minimind.datasets.batches import Batches, Extra
from minimind.datasets.encoded import EncodedDataset
from minimind.model.generate import Sampling, generate
from minimind.model.transformer import ModelConfig, Transformer
from minimind.objectives.distill import TEACHER_IDS, TEACHER_LOGPROBS, Distill
from minimind.objectives.dpo import Dpo
from minimind.objectives.loss import Objective
from minimind.objectives.next_token import NextToken
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.step import take_step

ROOT = Path(__file__).resolve().parents[1]
FORMS = {  # name: (dtype, MINIMIND_CPU_MATMULS, ONEDNN_MAX_CPU_ISA)
    "native": ("bfloat16", "native", ""),
    "in float32": ("bfloat16", "float32", ""),
    "float32": ("float32", "native", ""),
    "scalar": ("bfloat16", "native", "AVX2"),
}
WORKS = ("pretrain", "dpo", "distill", "decode")
NUM_STEPS = 8  # that there is different data for
MEAN_LENGTH = 90
NUM_PROMPTS, NUM_SAMPLES, NEW_TOKENS = 32, 8, 16

Step = Callable[[], int]  # returns its tokens


def main() -> None:
    arguments = _parse()
    workers = {name: _start(name, arguments) for name in FORMS}
    rates: dict[str, dict[str, list[float]]] = {w: {name: [] for name in FORMS} for w in WORKS}
    started = time.monotonic()
    for number in count():
        left = arguments.seconds - (time.monotonic() - started)
        if left < 0 and number > 2:
            break
        for work in WORKS:
            for name in FORMS:
                is_slow = name == "scalar"  # once is enough
                if is_slow and number != 1:
                    continue
                rate = _ask(workers[name], work)
                if number:  # the first warms up
                    rates[work][name].append(rate)
            print(f"{time.monotonic() - started:.0f} s: {work}", file=sys.stderr)
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    rows = [_row(work, name, rates[work]) for work in WORKS for name in FORMS if name != "float32"]
    setting = {
        "processor": _processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
        "unit": "tokens/s",
    }
    arguments.output.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")
    print("| work | bfloat16 | tokens/s | float32: tokens/s | ratio | quartiles | rounds |")
    print("|---|---|---:|---:|---:|---|---:|")
    for row in rows:
        print("| {work} | {form} | {rate:,} | {float32:,} | {ratio} | ".format(**row), end="")
        print("{low}-{high} | {rounds} |".format(**row))


def _row(work: str, name: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    pairs = list(zip(rates[name], rates["float32"], strict=False))
    ratios = [ours / float32 for ours, float32 in pairs]
    low, high = quartiles(ratios)
    return {
        "work": work,
        "form": name,
        "rate": round(statistics.median(rate for rate, _ in pairs)),
        "float32": round(statistics.median(rate for _, rate in pairs)),
        "ratio": round(statistics.median(ratios), 2),
        "low": round(low, 2),
        "high": round(high, 2),
        "rounds": len(pairs),
    }


def _start(name: str, arguments: argparse.Namespace) -> "subprocess.Popen[str]":
    dtype, matmuls, isa = FORMS[name]
    command = [sys.executable, "-m", "benchmarks.matmuls", "--worker", dtype, matmuls]
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})
    return subprocess.Popen(
        [*command, "--threads", str(arguments.threads)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(worker: "subprocess.Popen[str]", work: str) -> float:
    """Tokens a second of a step of some work in that process."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{work}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _work(dtype: str, matmuls: str, threads: int) -> None:
    """What a worker does: for every line that names a work, one with its tokens a second."""
    torch.set_num_threads(threads)
    choose_matmuls(matmuls)
    assert bool(matmuls_in_float32()) == (matmuls == "float32")
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        steps = {work: _prepare(work, params, dtype, Path(folder)) for work in WORKS}
        for line in sys.stdin:
            started = time.monotonic()
            tokens = steps[line.strip()]()
            print(tokens / (time.monotonic() - started), flush=True)


def _prepare(work: str, params: dict[str, Any], dtype: Any, folder: Path) -> Step:
    vocab_size = params["tokenizer"]["vocab_size"]
    shape = params["distill"]["student"] if work == "distill" else params["model"]
    model = Transformer(ModelConfig(**shape, vocab_size=vocab_size))
    model.initialize(0)
    rng = np.random.default_rng(0)
    numbers = count()
    if work == "decode":
        prompts = [rng.integers(3, vocab_size, 40).tolist() for _ in range(NUM_PROMPTS)]

        def decode() -> int:
            completions = generate(
                model.eval(),
                prompts,
                max_new_tokens=NEW_TOKENS,
                end_id=-1,
                dtype=dtype,
                sampling=Sampling(1.0, 1.0, next(numbers), range(NUM_PROMPTS * NUM_SAMPLES)),
                num_samples_per_prompt=NUM_SAMPLES,
                with_logprobs=True,
            )
            return sum(map(len, completions.ids))

        return decode

    section = params[work]
    per_sample = 2 if work == "dpo" else 1
    rows = []
    for _ in range(NUM_STEPS * section["batch_size"] * per_sample):
        length = int(rng.integers(MEAN_LENGTH // 2, MEAN_LENGTH * 3 // 2))
        context = 1 if work == "pretrain" else length // 3
        ids = rng.integers(3, vocab_size, length).tolist()
        rows.append((ids, [0] * context + [1] * (length - context)))
    write_rows(folder / work, rows, pairs=work == "dpo")
    data = EncodedDataset.open(folder / work)
    objective, extras = _objective(work, params, data, rng)
    batches = Batches(
        data, np.arange(data.num_samples), section["batch_size"], 1, 1.0, 0, 0, extras
    )
    keys = {key: section[key] for key in OptimizerConfig.model_fields if key != "dtype"}
    optimizer = Optimizer(model.train(), OptimizerConfig(**keys | {"dtype": dtype}), CPU)
    run = bare_run(compile=False)

    def train() -> int:
        step = batches.step(next(numbers) % batches.num_steps, rank=0, world=1)
        take_step(model, objective, optimizer, step, 0.0, 1.0, run)
        return sum(len(batch.tokens.ids) for batch in step.micro_batches)

    return train


def _objective(
    work: str, params: dict[str, Any], data: EncodedDataset, rng: np.random.Generator
) -> tuple[Objective, dict[str, Extra]]:
    if work == "dpo":
        section = params["dpo"]
        reference = rng.normal(-400, 20, data.rows).astype(np.float32)
        objective = Dpo(section["beta"], section["reduction"], section["nll_weight"])
        return objective, {"reference": Extra(reference, per="rows")}
    if work == "distill":
        section, vocab_size = params["teacher_outputs"], params["tokenizer"]["vocab_size"]
        num_tokens, top_k = int(data.trained_offsets[-1]), section["top_k"]
        ids = np.argsort(rng.random((num_tokens, vocab_size)), axis=1)[:, :top_k]
        logprobs = np.full((num_tokens, top_k + 1), -np.log(top_k + 1))
        extras = {
            TEACHER_IDS: Extra(ids.astype(np.uint16), per="tokens"),
            TEACHER_LOGPROBS: Extra(logprobs.astype(np.float16), per="tokens"),
        }
        return Distill(params["distill"]["alpha"], section["temperature"], None), extras
    return NextToken(), {}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring, about")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/matmuls.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # how it calls itself
    return parser.parse_args()


if __name__ == "__main__":
    given = _parse()
    if given.worker:
        _work(*given.worker, given.threads)
    else:
        main()
