"""What saving states costs, as a share of training time at the default interval.

python -m benchmarks.saving              # the model of params.yaml, and that of preset small
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from minimind.cli.presets import merge, read_preset
from minimind.compute.settings import load_settings
from minimind.lineage.resume import ResumeCheckpoint, ResumeStore
from minimind.model.transformer import ModelConfig, ModelShape, Transformer
from minimind.params import with_shared
from minimind.training.optimizer import Optimizer, OptimizerConfig
from minimind.training.run import SAVE_SPACING

NUM_SAVES = 5
ROOT = Path(__file__).resolve().parents[1]


def state_of(params: dict[str, Any]) -> ResumeCheckpoint:
    """What a pretraining run has to save after its first step."""
    shape = ModelShape.model_validate(params["model"])
    model = Transformer(
        ModelConfig(vocab_size=params["tokenizer"]["vocab_size"], **shape.model_dump())
    )
    model.initialize(1)
    values = with_shared(params["pretrain"], params, OptimizerConfig)
    config = OptimizerConfig(**{key: values[key] for key in OptimizerConfig.model_fields})
    optimizer = Optimizer(model, config, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1.0)
    tensors = {f"model/{name}": p for name, p in model.named_parameters()}
    tensors |= {f"optimizer/{name}": t for name, t in optimizer.state_tensors().items()}
    return ResumeCheckpoint(0, tensors, {})


def measure(name: str, params: dict[str, Any], directory: Path) -> dict[str, Any]:
    state = state_of(params)
    seconds = []
    store = ResumeStore(directory / name)
    for step in range(NUM_SAVES):
        started = time.monotonic()
        store.save(ResumeCheckpoint(step, state.tensors, state.values))
        seconds.append(time.monotonic() - started)
    store.remove()
    store.close()
    slowest, between = max(seconds), load_settings().save_seconds
    interval = max(between, SAVE_SPACING * slowest)
    return {
        "model": name,
        "state_mb": round(sum(t.nbytes for t in state.tensors.values()) / 1e6, 1),
        "median_seconds": round(statistics.median(seconds), 3),
        "slowest_seconds": round(slowest, 3),
        "interval_seconds": round(interval, 1),
        "share_percent": round(100 * slowest / (interval + slowest), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="small", help="with commas, beside params.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    names = [name for name in arguments.presets.split(",") if name]
    states = ROOT / ".resume"
    states.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=states) as directory:
        results = [measure("params.yaml", params, Path(directory))]
        for name in names:
            preset = merge(params, read_preset(ROOT / "presets", name))
            results.append(measure(name, preset, Path(directory)))
    for row in results:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
