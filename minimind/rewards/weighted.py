"""The parts of a reward that have a weight, added up."""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from inspect import getfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, create_model, model_validator

from minimind.errors import UserError, importing
from minimind.params import Section
from minimind.rewards.reward import Given, Reward, Sample, Values


@cache
def reward_classes() -> dict[str, type[Reward]]:
    """The class REWARD of every other module of this package, by the module's name.

    Raises:
        UserError: a module cannot be imported, or has no such class.
    """
    classes: dict[str, type[Reward]] = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if (name := file.stem) not in ("reward", "weighted"):
            with importing(file):
                module = import_module(f"minimind.rewards.{name}")
            reward = getattr(module, "REWARD", None)
            if not (isinstance(reward, type) and issubclass(reward, Reward)):
                raise UserError(
                    f"{file} has no class REWARD; end it with REWARD = and its subclass of Reward."
                )
            classes[name] = reward
    return classes


def _keys() -> dict[str, Any]:
    """The fields of a section `rewards`: the weight of each part, and its options."""
    keys: dict[str, Any] = {}
    for name, reward in reward_classes().items():
        keys[name] = (float, Field(reward.default_weight, ge=0, le=1e6))
    for reward in reward_classes().values():
        for option, field in reward.model_fields.items():
            if option in keys:
                raise UserError(
                    f"{getfile(reward)}: the option {option} is one of another reward, or its "
                    "name; give it another name."
                )
            keys[option] = (field.annotation, field)
    return keys


class RewardsConfig(create_model("_Keys", __base__=Section, **_keys())):  # type: ignore[misc]
    """A section's `rewards`: weights of the parts, 0 leaving a part out, and the parts' options."""

    @model_validator(mode="after")
    def _some_part_counts(self) -> "RewardsConfig":
        if not self.weights():
            raise ValueError("at least one weight must be above 0")
        return self

    def weights(self) -> dict[str, float]:
        """Parts with a weight above 0; no other is computed."""
        weights = {name: getattr(self, name) for name in reward_classes()}
        return {name: weight for name, weight in weights.items() if weight}

    def part(self, name: str) -> Reward:
        """A part with its options."""
        reward = reward_classes()[name]
        return reward(**{option: getattr(self, option) for option in reward.model_fields})


class Rewards:
    """Scores samples by the parts that have a weight."""

    def __init__(self, config: RewardsConfig, given: Given) -> None:
        self.given = given
        self.weights = config.weights()
        self.rewards = {name: config.part(name) for name in self.weights}

    def parts(self, samples: Sequence[Sample]) -> dict[str, Values]:
        """Each part of each sample, unweighted: float64 [B] by the part's name.

        Raises:
            UserError: a part is NaN or infinite: a reward model may be broken.
        """
        parts = {}
        for name, reward in self.rewards.items():
            values = np.asarray(reward.score(samples, self.given), dtype=np.float64)
            if not all(map(math.isfinite, values)):
                raise UserError(f"the reward {name} is not finite; look at what computes it.")
            parts[name] = values
        return parts

    def total(self, parts: dict[str, Values]) -> Values:
        """The weighted sum of parts [B]."""
        return np.sum([weight * parts[name] for name, weight in self.weights.items()], axis=0)

    def scaled(self, totals: Values) -> Values:
        """Totals [B] from their least to their greatest possible value, as 0 to 1."""
        bounds = {name: reward.bounds() for name, reward in self.rewards.items()}
        low = sum(weight * bounds[name][0] for name, weight in self.weights.items())
        high = sum(weight * bounds[name][1] for name, weight in self.weights.items())
        return np.clip((totals - low) / (high - low), 0.0, 1.0)
