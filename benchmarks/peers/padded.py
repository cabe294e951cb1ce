"""The plain way to write it: padded batches, float32, everything computed at every position.

The model is transformers' Llama with the same weights; rows are padded to the batch's longest.
"""

from collections.abc import Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.material import PAD, Material, Row, num_trained, padded
from benchmarks.peers import Step
from minimind.model.transformer import Transformer


def prepare(material: Material, work: str) -> Step | None:
    if work not in ("pretrain", "sft", "dpo", "reason", "distill"):
        return None
    model = llama(material.model())
    other = None
    if work in ("dpo", "distill"):
        other = llama(material.model() if work == "dpo" else material.teacher())
        other.eval().requires_grad_(False)
    section = material.params[work]
    temperature = material.params["teacher_outputs"]["temperature"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=section["lr"])
    numbers = count()

    def step() -> int:
        rows = material.rows_of_step(work, next(numbers))
        if work == "dpo":
            loss = dpo_loss(model, other, rows, section["beta"])
        elif work == "distill":
            loss = distill_loss(model, other, rows, section["alpha"], temperature)
        else:
            loss = next_token_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        return num_trained(rows)

    return step


def llama(model: Transformer) -> LlamaForCausalLM:
    """transformers' model with these weights, in float32."""
    shape = model.config
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    other = LlamaForCausalLM(config)
    other.load_state_dict(model.state_dict(), strict=False)
    other.tie_weights()
    return other


def next_token_loss(model: LlamaForCausalLM, rows: Sequence[Row]) -> Tensor:
    logits, labels = _logits(model, rows)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def dpo_loss(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, rows: Sequence[Row], beta: float
) -> Tensor:
    rewards = beta * (_row_logprobs(model, rows) - _no_grad(_row_logprobs, reference, rows))
    return -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()


def distill_loss(
    model: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    rows: Sequence[Row],
    alpha: float,
    temperature: float,
) -> Tensor:
    logits, labels = _logits(model, rows)
    teacher_logits = _no_grad(_logits, teacher, rows)[0]
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    is_trained = labels != -100
    divergence = F.kl_div(
        (logits[is_trained] / temperature).log_softmax(-1),
        (teacher_logits[is_trained] / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence


def _logits(model: LlamaForCausalLM, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Logits [N, L-1, V] of every position but the last, and the labels they are to predict."""
    ids, labels = padded(rows)
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    return logits[:, :-1], labels[:, 1:]


def _row_logprobs(model: LlamaForCausalLM, rows: Sequence[Row]) -> Tensor:
    logits, labels = _logits(model, rows)
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where -100
    return -losses.sum(1)


def _no_grad(function, *arguments):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return function(*arguments)
