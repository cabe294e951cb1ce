"""MiniMind's own scripts, out of the folder of a clone: their models, loops and losses.

Each script's own training function runs, with the rows of this benchmark padded as its data sets
pad them, on CPU in float32 as the scripts do there. What is left out is reading and tokenizing.
Reasoning has no script of its own any more: it is fine-tuning, and longer rows.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from benchmarks.material import END, PAD, Material, num_trained, padded
from benchmarks.paced import Paced
from benchmarks.peers import Step
from benchmarks.peers.hf import drawing_step, left_padded
from benchmarks.peers.ours import text_reward
from benchmarks.peers.words import words, words_tokenizer
from minimind.model.transformer import ModelConfig

NEVER = 10**9
SCRIPTS = {
    "pretrain": "train_pretrain",
    "sft": "train_full_sft",
    "reason": "train_full_sft",
    "dpo": "train_dpo",
    "distill": "train_distillation",
    "grpo step": "train_grpo",
}


def prepare(material: Material, work: str, clone: Path) -> Step | None:
    if str(clone) not in sys.path:
        sys.path.insert(0, str(clone))
    if work == "rollouts":
        return _rollouts(material)
    if work == "grpo step":
        return _grpo(material)
    if work in SCRIPTS:
        return _supervised(material, work)
    return None  # the end tokens of its top-k sampling come sooner: not the same work


def _model(config: ModelConfig) -> Any:
    module = importlib.import_module("model.model_minimind")
    theirs = module.MiniMindConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
    )
    return module.MiniMindForCausalLM(theirs)


def _script(material: Material, work: str, **arguments: Any) -> tuple[ModuleType, Any]:
    """A training script with all that its main part would have set, and its model."""
    script = importlib.import_module(f"trainer.{SCRIPTS[work]}")
    section = material.params["grpo" if work == "grpo step" else work]
    model = _model(material.config)
    script.args = SimpleNamespace(
        device="cpu",
        epochs=1,
        learning_rate=section["lr"],
        accumulation_steps=1,
        grad_clip=section["grad_clip"],
        log_interval=NEVER,
        save_interval=NEVER,
        **arguments,
    )
    script.model = model
    script.optimizer = torch.optim.AdamW(model.parameters(), lr=section["lr"])
    script.scaler = torch.amp.GradScaler("cpu", enabled=False)
    script.autocast_ctx = nullcontext()
    script.lm_config = model.config
    return script, model


def _supervised(material: Material, work: str) -> Step:
    script, model = _script(material, work)
    length, numbers, trained = material.max_length(work), count(), [0]

    def loader(wait: Callable[[], None]) -> Iterator[Any]:
        while True:
            wait()
            rows = material.rows_of_step(work, next(numbers))
            trained[0] = num_trained(rows)
            if work == "dpo":
                yield _pairs(rows, length)
            else:
                yield padded(rows, length)

    def loop(wait: Callable[[], None]) -> None:
        batches, section = loader(wait), material.params[work]
        if work == "dpo":
            reference = _model(material.config).eval().requires_grad_(False)
            script.train_epoch(0, batches, NEVER, reference, model.config, beta=section["beta"])
        elif work == "distill":
            teacher, temperature = _model(material.teacher_config), 1.5
            script.train_epoch(
                0,
                batches,
                NEVER,
                teacher,
                model.config,
                alpha=section["alpha"],
                temperature=temperature,
            )
        else:
            script.train_epoch(0, batches, NEVER)

    paced = Paced(loop)

    def step() -> int:
        paced.step()
        return trained[0]

    return step


def _pairs(rows: list[Any], length: int) -> dict[str, torch.Tensor]:
    """A batch as its preference data set makes it."""
    batch = {}
    for name, side in (("chosen", rows[0::2]), ("rejected", rows[1::2])):
        ids, labels = padded(side, length)
        batch |= {f"x_{name}": ids[:, :-1], f"y_{name}": ids[:, 1:]}
        batch[f"mask_{name}"] = (labels[:, 1:] != -100).long()
    return batch


def _rollouts(material: Material) -> Step:
    model = _model(material.config).eval()
    ids, mask = left_padded(material)
    return drawing_step(
        lambda: model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=material.sizes.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            eos_token_id=None,
        ),
        ids.shape[1],
    )


class _RewardModel:
    """In place of a reward model, whose time is nobody's."""

    def get_score(self, _messages: object, response: str) -> float:
        return text_reward(response)


def _grpo(material: Material) -> Step:
    sizes, section = material.sizes, material.params["grpo"]
    script, model = _script(
        material,
        "grpo step",
        num_generations=sizes.num_samples,
        max_seq_len=512,
        max_gen_len=sizes.grpo_tokens,
        beta=section["beta"],
        loss_type="grpo",
        epsilon=section["epsilon"],
        epsilon_high=5.0,
        debug_mode=False,
    )
    tokenizer = words_tokenizer(material.config.vocab_size)
    script.tokenizer = tokenizer
    script.scheduler = torch.optim.lr_scheduler.ConstantLR(script.optimizer, factor=1.0)
    reference = _model(material.config).eval().requires_grad_(False)
    engine = script.create_rollout_engine("torch", model, tokenizer, "cpu", nullcontext())
    drawn = [0]
    rollout = engine.rollout

    def counted(**arguments: Any) -> Any:
        result = rollout(**arguments)
        new = result.completion_ids
        before_end = (new == END).long().cumsum(1) - (new == END).long()
        drawn[0] = int((before_end == 0).sum())
        return result

    engine.rollout = counted
    texts = [words(ids) for ids in material.prompts]

    def loop(wait: Callable[[], None]) -> None:
        def loader() -> Iterator[dict[str, list[str]]]:
            for number in count():
                wait()
                first = number * sizes.grpo_prompts % len(texts)
                yield {"prompt": texts[first : first + sizes.grpo_prompts]}

        script.grpo_train_epoch(0, loader(), NEVER, engine, reference, _RewardModel())

    paced = Paced(loop)

    def step() -> int:
        paced.step()
        return drawn[0]

    return step


assert PAD == 0  # as in its tokenizer
