"""Keys of rows that nobody reads: told once a file, as each may be a mistake."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minimind.datasets.formats import Row
from minimind.datasets.sources import Place, shown

# What it means in data for TRL, MiniMind, OpenAI, LLaMA-Factory that no format here reads.
ELSEWHERE: Mapping[str, str] = {
    "completion": "what is learned after a prompt",
    "label": "whether a completion is wanted",
    "reasoning_content": "a thought before the content",
    "tool_calls": "calls of tools",
    "tools": "what can be called",
    "functions": "what can be called",
    "system": "the system turn",
    "history": "earlier turns",
    **dict.fromkeys(("images", "audios", "videos"), "what is asked about"),
    "weight": "how much it counts",
    "loss": "whether it is trained on",
    "mask": "whether it is trained on",
    "train": "whether it is trained on",
    "margin": "how much better chosen is",
    "chosen_score": "how good chosen is",
    "rejected_score": "how good rejected is",
    "score_chosen": "how good chosen is",
    "score_rejected": "how good rejected is",
}

_SHOWN_KEYS = 12


class UnreadKeys:
    """Keys that a source's format does not read: how many rows have each, and the first of them."""

    def __init__(self, known: Sequence[str] = ()) -> None:
        """known: all keys that rows may have; any other is then warned of as a misspelt one."""
        self.num_warned = 0  # rows with a key that is warned of
        self._known = known
        self._num_rows: Counter[str] = Counter()
        self._first: dict[str, Place] = {}

    def add(self, row: Row[Any]) -> None:
        for key in row.unread:
            self._num_rows[key] += 1
            self._first.setdefault(key, row.place)
        self.num_warned += any(map(self._is_warned_of, row.unread))

    def shown(self, warned: bool) -> str:
        """The most frequent ones that are warned of, or the others; "" if there are none."""
        found = [
            f"{shown(key)} in {count} rows, first {self._first[key]}"
            + (f" (elsewhere {_meaning(key)})" if warned and _meaning(key) else "")
            for key, count in self._num_rows.most_common()
            if self._is_warned_of(key) == warned
        ]
        known = f"; known are {', '.join(self._known)}" if found and self._known else ""
        return "; ".join(found[:_SHOWN_KEYS]) + ("; ..." * (len(found) > _SHOWN_KEYS)) + known

    def _is_warned_of(self, key: str) -> bool:
        return bool(self._known or _meaning(key))


def _meaning(key: str) -> str | None:
    return ELSEWHERE.get(key.rpartition(".")[2])
