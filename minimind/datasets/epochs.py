"""How many steps some epochs are: one exact count for samples, prompts and shares of them."""

from fractions import Fraction


def exact(number: float) -> Fraction:
    """A parameter's value as it was written: 1.1 is 11/10, although the float is a bit more."""
    return Fraction(str(number))


def steps_per_epoch(num_samples: int, samples_per_step: int) -> int:
    """Steps that take each of `num_samples` once; the last one takes what is left."""
    return -(-num_samples // samples_per_step)


def num_steps(epochs: float, num_samples: int, samples_per_step: int, max_steps: int) -> int:
    """Steps of so many epochs, at most `max_steps` unless that is 0.

    Whole epochs end with a step that takes what is left. A part of an epoch takes as many steps as
    hold that part of the samples, the last one whole.
    """
    whole, part = divmod(exact(epochs), 1)
    last = -(-part * num_samples // samples_per_step)
    steps = int(whole) * steps_per_epoch(num_samples, samples_per_step) + int(last)
    return min(steps, max_steps) if max_steps else steps
