"""How fast lm-evaluation-harness judges a checkpoint by our backend, beside `--model hf`.

python -m benchmarks.judged models/reason data/mini_world/eval.jsonl, after `make repro`

In float32, in turns, by the time of one thread; a ratio is one of the same round: of what models
do, and of whole evaluations, with the harness's own work for each question. `hf` pads its batches:
MiniMind's are of 8, and larger ones may be faster. The large model is preset small's, with random
weights: how fast a model is does not depend on them.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval.models.huggingface import HFLM

from benchmarks.table import as_text, ratio_rows, save
from minimind.chat.tokenizer import ChatTokenizer
from minimind.evaluation.harness import LmEvalConfig, MiniMindLM, judge
from minimind.model.checkpoint import save_checkpoint
from minimind.model.transformer import ModelConfig, Transformer
from minimind.tasks.problem import Problem, read_problems

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/lm_eval.json"
TASKS = ROOT / "lm-eval/tasks"
BATCH_SIZES = (8, 32)  # of theirs
COLUMNS = ["question", "A", "B", "C", "D", "answer"]
WORKS = {  # task, examples, questions of the small model and of the large one, which writes slowly
    "choices, no examples": ("ceval_form", 0, 100, 16),
    "choices, 5 examples": ("ceval_form", 5, 100, 16),
    "answers, 5 examples": ("gsm8k_form", 5, 20, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("problems", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_tasks(folder, read_problems(arguments.problems))
        _write_large(folder / "large", arguments.checkpoint)
        models = {"built-in": arguments.checkpoint, "26M": folder / "large"}
        for size, (name, checkpoint) in enumerate(models.items()):
            for work, (task, num_fewshot, *limits) in WORKS.items():
                if not limits[size]:
                    continue
                config = LmEvalConfig(tasks=[task], num_fewshot=num_fewshot, limit=limits[size])
                for part, rates in _rates(_peers(checkpoint), folder, config, arguments.rounds):
                    found = ratio_rows(f"{name}: {work}{part}", rates)
                    rows += [{**row, "unit": "questions/s"} for row in found]
                    print(as_text(rows[-len(found) :]), flush=True)
    save(
        RESULTS,
        rows,
        {"threads": 1, "torch": torch.__version__, "dtype": "float32", "time": "processor"},
    )


def _peers(checkpoint: Path) -> dict[str, Any]:
    hf = partial(HFLM, str(checkpoint), device="cpu", dtype="float32")
    theirs = {f"hf, batches of {n}": hf(batch_size=n) for n in BATCH_SIZES}
    return {"ours": MiniMindLM(checkpoint), **theirs}


def _rates(
    peers: dict[str, Any], folder: Path, config: LmEvalConfig, rounds: int
) -> list[tuple[str, dict[str, list[float]]]]:
    """Questions a second of each, a number for each round: of the models alone, and of all."""
    alone: dict[str, list[float]] = {name: [] for name in peers}
    whole: dict[str, list[float]] = {name: [] for name in peers}
    metrics, spent = {}, [0.0]
    assert config.limit is not None
    for name, model in peers.items():  # they warm up
        judge(model, name, config.model_copy(update={"limit": 2}), folder / "tasks")
        for method in ("loglikelihood", "generate_until"):
            setattr(model, method, _timed(getattr(model, method), spent))
    for _ in range(rounds):
        for name, model in peers.items():
            started, spent[0] = time.process_time(), 0.0
            metrics[name], _ = judge(model, name, config, folder / "tasks")
            alone[name].append(config.limit / spent[0])
            whole[name].append(config.limit / (time.process_time() - started))
    assert all(found == metrics["ours"] for found in metrics.values()), metrics
    return [("", alone), (", whole evaluation", whole)]


def _timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        answers = method(*arguments, **options)
        spent[0] += time.process_time() - started
        return answers

    return timed


def _write_tasks(folder: Path, problems: list[Problem]) -> None:
    """The forms, of C-Eval's with more questions than the samples have."""
    (folder / "tasks").mkdir()
    for file in TASKS.glob("*_form.yaml"):
        text = file.read_text(encoding="utf-8").replace("lm-eval/data/", f"{ROOT}/lm-eval/data/")
        text = text.replace(f"{ROOT}/lm-eval/data/ceval_val.csv", str(folder / "ceval_val.csv"))
        (folder / "tasks" / file.name).write_text(text, encoding="utf-8")
    with (folder / "ceval_val.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for problem in problems:
            is_chinese = not problem.prompt.isascii()
            if is_chinese and len(problem.choices) == 4 and problem.label is not None:
                writer.writerow([problem.prompt, *problem.choices, "ABCD"[problem.label]])


def _write_large(folder: Path, tokenizer: Path) -> None:
    preset = yaml.safe_load((ROOT / "presets/small.yaml").read_text(encoding="utf-8"))
    shape = {"vocab_size": preset["tokenizer"]["vocab_size"], **preset["model"]}
    assert shape["vocab_size"] >= ChatTokenizer.load(tokenizer).vocab_size
    model = Transformer(ModelConfig(**shape))
    model.initialize(1)
    save_checkpoint(folder, model, tokenizer)


if __name__ == "__main__":
    main()
