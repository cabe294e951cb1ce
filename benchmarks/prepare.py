"""A peer's step of a work, at the sizes that are compared."""

from pathlib import Path

from benchmarks.material import SUPERVISED, Material, Sizes
from benchmarks.peers import Step, ours

FULL = Sizes(
    samples={"pretrain": 32, "sft": 32, "dpo": 4, "reason": 8, "distill": 16},
    num_prompts=16,
    num_samples=8,
    new_tokens=128,
    grpo_prompts=2,
    grpo_tokens=128,
    num_steps=16,
)
SHORT = Sizes(
    samples={"pretrain": 8, "sft": 8, "dpo": 4, "reason": 8, "distill": 4},
    num_prompts=16,
    num_samples=8,
    new_tokens=128,
    grpo_prompts=2,
    grpo_tokens=128,
    num_steps=8,
)


def prepare(peer: str, material: Material, work: str, clone: Path | None) -> Step | None:
    """A peer's step of a work, or None where it does not do it or is not there."""
    # Imported here: they are extras, and take seconds.
    if peer == "ours":
        return ours.prepare(material, work)
    if peer == "ours compiled":
        return ours.prepare(material, work, compile=True) if work in SUPERVISED else None
    if peer == "padded":
        from benchmarks.peers import padded

        return padded.prepare(material, work)
    if peer == "hf":
        from benchmarks.peers import hf

        return hf.prepare(material, work)
    if peer == "trl":
        from benchmarks.peers import trl_peer

        return trl_peer.prepare(material, work)
    if clone is None:
        return None
    from benchmarks.peers import minimind_clone

    return minimind_clone.prepare(material, work, clone)
