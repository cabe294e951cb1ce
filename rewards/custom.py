"""A reward of your own: used when a stage's `rewards.custom` is above 0 in params.yaml.

Edit this file, or write another and name it as `grpo.custom_reward`. It is a dependency of the
stages that use it: DVC runs them again when it changes. What it imports is not tracked.
"""


def score(prompt: str, completion: str, answer: str | None) -> float:
    """A number from -1 to 1. This one prefers short thinking: 0 at no, -1 at 500 characters."""
    thought = completion.partition("</think>")[0]
    return -min(len(thought), 500) / 500
