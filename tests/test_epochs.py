"""Steps of epochs: every sample and prompt is taken as often as the epochs say."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.datasets.batches import Batches
from minimind.datasets.epochs import exact, num_steps, steps_per_epoch
from minimind.reinforcement.draws import Draws
from tests.tiny import random_rows, write_rows

# Epochs as they are written, in decimals.
EPOCHS = st.integers(1, 4000).map(lambda thousandths: thousandths / 1000) | st.floats(1e-6, 4)


@pytest.mark.parametrize(
    ("epochs", "num_samples", "per_step", "steps"),
    [
        (2, 10, 4, 6),  # each epoch has a smaller last step
        (7, 10, 256, 7),
        (1.1, 10, 1, 11),  # the float 1.1 is a bit more, and so is ten times 0.1 of it
        (2.3, 10, 1, 23),  # the float 2.3 is a bit less
        (2.3, 100, 10, 23),
        (0.1 + 0.2, 10, 1, 4),  # written 0.30000000000000004, more than three samples
        (1e-6, 10, 4, 1),
        (1e6, 3, 2, 2_000_000),
    ],
)
def test_steps_are_counted_exactly(
    epochs: float, num_samples: int, per_step: int, steps: int
) -> None:
    assert num_steps(epochs, num_samples, per_step, max_steps=0) == steps
    assert num_steps(epochs, num_samples, per_step, max_steps=3) == min(steps, 3)


@given(epochs=EPOCHS, num_samples=st.integers(1, 60), per_step=st.integers(1, 70))
def test_every_prompt_is_seen_as_often_as_the_epochs_say(
    epochs: float, num_samples: int, per_step: int
) -> None:
    draws = Draws(num_samples, per_step, seed=1)
    steps = draws.num_steps(epochs, max_steps=0)
    require_epochs([draws.in_turn(k) for k in range(steps)], epochs, num_samples, per_step)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    return write_rows(tmp_path_factory.mktemp("data"), random_rows(60))


@settings(deadline=None)
@given(
    epochs=EPOCHS,
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    accumulation_steps=st.integers(1, 9),
)
def test_every_sample_is_seen_as_often_as_the_epochs_say(
    dataset, epochs: float, num_samples: int, batch_size: int, accumulation_steps: int
) -> None:
    samples = np.arange(num_samples)
    batches = Batches(
        dataset, samples, batch_size, accumulation_steps, epochs, max_steps=0, seed=1, extras={}
    )
    taken = [batches.samples_of(k) for k in range(batches.num_steps)]
    require_epochs(taken, epochs, num_samples, batch_size * accumulation_steps)


def require_epochs(steps: list, epochs: float, num_samples: int, per_step: int) -> None:
    whole, part = divmod(exact(epochs), 1)
    times = Counter(dict.fromkeys(range(num_samples), 0))
    times.update(int(index) for step in steps for index in step)
    assert all(whole <= seen <= whole + (part > 0) for seen in times.values())
    # All that the part of an epoch calls for is taken, and with it no whole step more.
    surplus = times.total() - exact(epochs) * num_samples
    assert 0 <= surplus < per_step
    assert all(0 < len(step) <= per_step for step in steps)


@given(epochs=EPOCHS, num_samples=st.integers(1, 10**9), per_step=st.integers(1, 10**6))
def test_more_epochs_are_never_fewer_steps(epochs: float, num_samples: int, per_step: int) -> None:
    steps = num_steps(epochs, num_samples, per_step, 0)
    assert steps <= num_steps(epochs + 1, num_samples, per_step, 0)
    assert steps >= exact(epochs) * num_samples / per_step
    assert steps_per_epoch(num_samples, per_step) == num_steps(1.0, num_samples, per_step, 0)


def test_a_parameter_is_what_was_written() -> None:
    assert exact(1.1) == Fraction(11, 10)
    assert exact(3.0) == 3
    assert exact(1e-7) == Fraction(1, 10**7)
