"""The answer: 1 where it is right, by the problem's own scoring, as in evaluation."""

from collections.abc import Sequence

from minimind.rewards.reward import Given, Reward, Sample


class Answer(Reward):
    """0 or 1, by :meth:`minimind.tasks.problem.Problem.score`."""

    default_weight = 1.0

    def score(self, samples: Sequence[Sample], given: Given) -> list[float]:
        return [float(sample.problem.score(sample.completion).correct) for sample in samples]


REWARD = Answer
