"""Those that do the same work: each module has `prepare(material, work) -> Step`, or None."""

from collections.abc import Callable

# Does one step and returns how many tokens it trained on or drew.
Step = Callable[[], int]
