"""torch.compile: always, never, or where it pays for the length of a stage."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from minimind.errors import UserError
from minimind.runtime.settings import RuntimeSettings

if TYPE_CHECKING:
    from minimind.runtime.run import Run

# To find out costs a compilation, so it is tried only where a likely gain would pay for a likely
# cost (benchmarks/ has both); what is then chosen depends on what was measured.
LIKELY_GAIN = 0.25  # of an eager step's time
LIKELY_COMPILE_SECONDS = 40.0
TIMED_STEPS = 3


def compiled(model: nn.Module, settings: RuntimeSettings) -> nn.Module:
    """The model, or a compiled form of it that shares its parameters.

    Raises:
        UserError: PyTorch cannot compile from where it is installed.
    """
    if settings.compile is not True:
        return model
    if not can_compile():
        raise UserError(
            "MINIMIND_COMPILE is true, but PyTorch cannot compile from "
            f"{Path(torch.__file__).parent}, a path with spaces; set it to false, or move the "
            "project to a path without any."
        )
    return _compiled(model)


def can_compile() -> bool:
    """Whether the C++ compiler finds PyTorch: inductor gives it paths unquoted."""
    return not any(character.isspace() for character in torch.__file__)


def choose_form(
    forward: nn.Module, attempt: Callable[[nn.Module], None], num_steps: int, run: "Run"
) -> nn.Module:
    """With MINIMIND_COMPILE=auto the faster form of `forward` for so many steps, else itself.

    attempt: computes a step with the form it is given, and changes nothing but gradients.
    What was measured and chosen goes into the stage's record.
    """
    if run.settings.compile != "auto":
        return forward
    if not can_compile():
        run.record["compile_trial"] = {"chosen": "eager: PyTorch's path has spaces"}
        return forward
    if run.processes.world > 1:
        return forward  # each would measure otherwise, and all must choose the same
    generators = torch.get_rng_state()
    attempt(forward)  # the first takes longer, in either form
    eager = _seconds(attempt, forward)
    trial: dict[str, float | str] = {"eager_seconds_a_step": round(eager, 4)}
    form = forward
    if num_steps * eager * LIKELY_GAIN < LIKELY_COMPILE_SECONDS:
        trial["chosen"] = "eager: too short a stage to pay for compiling"
    else:
        candidate = _compiled(forward)
        started = time.monotonic()
        attempt(candidate)
        trial["compile_seconds"] = round(time.monotonic() - started, 1)
        attempt(candidate)  # another number of tokens may compile again
        faster = _seconds(attempt, candidate)
        trial["compiled_seconds_a_step"] = round(faster, 4)
        # By now compiling has been paid for: what is left is which form is faster.
        form = candidate if faster < eager else forward
        trial["chosen"] = "eager: it is faster" if form is forward else "compiled"
    torch.set_rng_state(generators)
    run.record["compile_trial"] = trial
    run.is_compiled = form is not forward
    run.say(f"compile: {trial['chosen']}")
    return form


def _compiled(model: nn.Module) -> nn.Module:
    # Every batch has another number of tokens: one dynamic graph, not one for each.
    return cast(nn.Module, torch.compile(model, dynamic=True))


def _seconds(attempt: Callable[[nn.Module], None], form: nn.Module) -> float:
    times = []
    for _ in range(TIMED_STEPS):
        started = time.monotonic()
        attempt(form)
        times.append(time.monotonic() - started)
    return median(times)
