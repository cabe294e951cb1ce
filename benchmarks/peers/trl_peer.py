"""TRL's trainers, in the best settings found on CPU: bfloat16, packing, reference precomputed.

Each trainer runs its own loop; a step is from one call of its `training_step` to the next.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.material import PAD, Material
from benchmarks.paced import Paced
from benchmarks.peers import Step
from benchmarks.peers.ours import text_reward
from benchmarks.peers.padded import llama
from benchmarks.peers.words import words, words_tokenizer

BEST_SAMPLES = 8  # of a step: 32 of pretraining take it twice as long a token

datasets.disable_progress_bars()
transformers_logging.set_verbosity_error()
logging.getLogger("trl").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="trl")


def prepare(material: Material, work: str) -> Step | None:
    makers = {
        "pretrain": _sft,
        "sft": _sft,
        "reason": _sft,
        "dpo": _dpo,
        "distill": _gkd,
        "grpo step": _grpo,
    }
    return paced(makers[work](material, work)) if work in makers else None


def paced(trainer: Any) -> Step:
    """One step of a trainer's own loop at a time."""
    tokens = [0]
    training_step, compute_loss = trainer.training_step, trainer.compute_loss

    def counted(model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if "labels" in inputs:
            tokens[0] += int((inputs["labels"][..., 1:] != -100).sum())
        else:
            tokens[0] += int(inputs["completion_mask"].sum())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = counted

    def loop(wait: Callable[[], None]) -> None:
        def waiting_step(*args: Any, **kwargs: Any) -> Tensor:
            wait()
            return training_step(*args, **kwargs)

        trainer.training_step = waiting_step
        trainer.train()

    runner = Paced(loop)

    def step() -> int:
        tokens[0] = 0
        runner.step()
        return tokens[0]

    return step


def _common(material: Material, work: str) -> dict[str, Any]:
    section = material.params["grpo" if work == "grpo step" else work]
    return {
        "output_dir": str(material.folder / "trl"),
        "max_steps": 10**6,
        "learning_rate": section["lr"],
        "max_grad_norm": section["grad_clip"],
        "per_device_train_batch_size": min(material.sizes.samples.get(work, 1), BEST_SAMPLES),
        "activation_checkpointing": False,
        "bf16": True,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _rows(material: Material, work: str) -> datasets.Dataset:
    rows = material.all_rows(work)
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": ids,
                "labels": [
                    token if trained else -100
                    for token, trained in zip(ids, loss_mask, strict=True)
                ],
            }
            for ids, loss_mask in rows
        ]
    )


def _sft(material: Material, work: str) -> SFTTrainer:
    # Rows of a packed batch are as long as the longest sample: about as many tokens as ours.
    common = _common(material, work)
    rows_per_batch = max(1, round(common["per_device_train_batch_size"] * 130 / 512))
    config = SFTConfig(
        **common | {"per_device_train_batch_size": rows_per_batch},
        max_length=512,
        packing=True,
        packing_strategy="bfd",
        shuffle_dataset=False,
    )
    return SFTTrainer(
        llama(material.model()),
        config,
        train_dataset=_rows(material, work),
        processing_class=words_tokenizer(material.config.vocab_size),
    )


def _dpo(material: Material, work: str) -> DPOTrainer:
    rows = material.all_rows(work)
    pairs = []
    for (chosen, loss_mask), (rejected, _) in zip(rows[0::2], rows[1::2], strict=True):
        context = loss_mask.index(1)
        pairs.append(
            {
                "prompt": words(chosen[:context]) + " ",
                "chosen": words(chosen[context:-1]),  # it adds the end token itself
                "rejected": words(rejected[context:-1]),
            }
        )
    config = DPOConfig(
        **_common(material, work),
        beta=material.params["dpo"]["beta"],
        max_length=512,
        precompute_ref_log_probs=True,
    )
    return DPOTrainer(
        llama(material.model()),
        args=config,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=words_tokenizer(material.config.vocab_size),
    )


def _gkd(material: Material, work: str) -> GKDTrainer:
    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        padded_ids = pad_sequence(ids, batch_first=True, padding_value=PAD)
        return {
            "input_ids": padded_ids,
            "attention_mask": (padded_ids != PAD).long(),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }

    config = GKDConfig(
        **_common(material, work),
        lmbda=0.0,  # on the data's own rows, not on the student's
        beta=0.0,  # forward divergence
        temperature=material.params["teacher_outputs"]["temperature"],
        max_length=512,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    return GKDTrainer(
        model=llama(material.model()),
        teacher_model=llama(material.teacher()).to(torch.bfloat16),
        args=config,
        train_dataset=_rows(material, work),
        data_collator=collate,
        processing_class=words_tokenizer(material.config.vocab_size),
    )


def _grpo(material: Material, work: str) -> GRPOTrainer:
    sizes = material.sizes
    rows = sizes.grpo_prompts * sizes.num_samples
    config = GRPOConfig(
        **_common(material, work) | {"per_device_train_batch_size": rows},
        num_generations=sizes.num_samples,
        max_completion_length=sizes.grpo_tokens,
        beta=material.params["grpo"]["beta"],
        temperature=1.0,
        loss_type="grpo",
        model_init_kwargs={"dtype": "float32"},
    )
    # It loads the reference from where the policy was loaded.
    policy = str(material.folder / "policy")
    llama(material.model()).save_pretrained(policy)
    prompts = [{"prompt": words(ids)} for ids in material.prompts]
    return GRPOTrainer(
        policy,
        reward_funcs=_reward,
        args=config,
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=words_tokenizer(material.config.vocab_size),
    )


def _reward(completions: list[str], **_columns: Any) -> list[float]:
    return [text_reward(completion) for completion in completions]
