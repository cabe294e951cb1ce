"""Hugging Face `generate`, in the best setting found on CPU: bfloat16 weights, growing cache.

A static cache was not faster (docs/log.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.material import END, PAD, Material
from benchmarks.peers import Step
from benchmarks.peers.padded import llama


def prepare(material: Material, work: str) -> Step | None:
    if work == "rollouts":
        model = material.model()
    elif work == "rollouts that end":
        model = material.ending_model(material.sizes.new_tokens // 3)
    else:
        return None
    theirs = llama(model).to(torch.bfloat16).eval()
    theirs.config.use_cache = theirs.generation_config.use_cache = True
    ids, mask = left_padded(material)

    def draw() -> Tensor:
        return theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=material.sizes.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            eos_token_id=END,
            pad_token_id=PAD,
        )

    return drawing_step(draw, ids.shape[1])


def left_padded(material: Material) -> tuple[Tensor, Tensor]:
    """Each prompt as often as it is sampled, padded on the left, and where no padding is."""
    longest = max(map(len, material.prompts))
    rows = [p for p in material.prompts for _ in range(material.sizes.num_samples)]
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    return ids, (ids != PAD).long()


def drawing_step(draw: Callable[[], Tensor], prompt_length: int) -> Step:
    """A step that counts the drawn tokens, each row's up to its end token."""

    def step() -> int:
        with torch.inference_mode():
            new = draw()[:, prompt_length:]
        before_end = (new == END).long().cumsum(1) - (new == END).long()
        return int((before_end == 0).sum())

    return step
