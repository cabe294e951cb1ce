"""Bilingual text without sense, as much of it as one likes: rows of JSONL, the same every time.

Words are invented and drawn with Zipf's frequencies, half of the rows Chinese, half English; the
lengths of rows are log-normal. A tokenizer finds in it what it finds in real text: few words
often, many words seldom, and clauses that hardly ever come again.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MEAN_BYTES, SPREAD = 1000, 0.8  # of a row's text
NUM_WORDS = 20_000  # of a language
BLOCK_WORDS = 2**18  # drawn at a time
PUNCTUATION = {"zh": ["，", "。", "、", "；", "：", "？"], "en": [",", ".", ";", ":", "?"]}
PUNCTUATION_SHARE = 0.12
ONSETS = ("b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "st", "th", "tr", "w")
RIMES = ("a", "e", "i", "o", "u", "ea", "ou", "an", "en", "er", "in", "ing", "on", "or", "ate")

Words = NDArray[np.object_]


def write_texts(file: Path, num_bytes: int, seed: int = 0) -> int:
    """Write rows of {"text"}, about so many bytes of them; returns their number."""
    return _write(file, ({"text": text} for text in texts(seed)), num_bytes)


def write_chats(file: Path, num_bytes: int, seed: int = 0) -> int:
    """Write chats, of one text each: turns by turns, at the ends of sentences."""
    return _write(file, ({"conversations": _turns(text)} for text in texts(seed)), num_bytes)


def texts(seed: int) -> Iterator[str]:
    """Texts without end; Chinese and English ones alternate."""
    rng = np.random.default_rng([seed, 0])
    words = {language: _words(language, rng) for language in PUNCTUATION}
    chances = {language: _chances(language) for language in PUNCTUATION}
    means = {
        language: float(sum(chances[language] * [len(w.encode()) for w in words[language]]))
        for language in PUNCTUATION
    }
    drawn = {language: _drawn(words[language], chances[language], rng) for language in PUNCTUATION}
    while True:
        for language in PUNCTUATION:
            num_bytes = rng.lognormal(np.log(MEAN_BYTES) - SPREAD**2 / 2, SPREAD)
            num_words = max(3, int(num_bytes / means[language]))
            text = "".join(next(drawn[language]) for _ in range(num_words))
            yield text.strip() + ("。" if language == "zh" else ".")


def _drawn(words: Words, chances: NDArray[np.float64], rng: np.random.Generator) -> Iterator[str]:
    bounds = np.cumsum(chances)
    bounds[-1] = 1.0
    while True:
        yield from words[np.searchsorted(bounds, rng.random(BLOCK_WORDS), side="right")]


def _words(language: str, rng: np.random.Generator) -> Words:
    """Punctuation, then words, the most frequent first."""
    invented: dict[str, None] = {}  # as a set that keeps its order
    while len(invented) < NUM_WORDS:
        if language == "zh":
            # Some characters are much more frequent than others, too.
            codes = 0x4E00 + (3000 * rng.random(rng.choice([1, 2, 2, 2, 3])) ** 2).astype(int)
            invented["".join(map(chr, codes))] = None
        else:
            syllables = rng.integers(1, 5)
            onsets, rimes = rng.choice(ONSETS, syllables), rng.choice(RIMES, syllables)
            word = "".join(f"{a}{b}" for a, b in zip(onsets, rimes, strict=True))
            invented[f" {word.capitalize() if rng.random() < 0.1 else word}"] = None
    words = list(invented)
    for rank in rng.integers(100, NUM_WORDS, NUM_WORDS // 100):  # some are numbers
        words[rank] = f"{' ' * (language == 'en')}{rank % 3000}"
    return np.array([*PUNCTUATION[language], *words], dtype=object)


def _chances(language: str) -> NDArray[np.float64]:
    num_marks = len(PUNCTUATION[language])
    marks = 1 / np.arange(1, num_marks + 1)
    words = 1 / np.arange(3, NUM_WORDS + 3)  # the first of them less frequent than Zipf says
    return np.concatenate(
        [
            PUNCTUATION_SHARE * marks / marks.sum(),
            (1 - PUNCTUATION_SHARE) * words / words.sum(),
        ]
    )


def _turns(text: str) -> list[dict[str, str]]:
    mark = "。" if text.endswith("。") else "."
    sentences = [sentence.strip() or "?" for sentence in text.split(mark)]
    sentences += ["?"] * (len(sentences) % 2)
    size = max(1, len(sentences) // 4)  # of a turn: four at the most, and what is left
    turns = [mark.join(sentences[i : i + size]) for i in range(0, len(sentences), size)]
    turns += ["?"] * (len(turns) % 2)
    return [
        {"role": ("user", "assistant")[number % 2], "content": turn}
        for number, turn in enumerate(turns)
    ]


def _write(file: Path, rows: Iterator[dict[str, object]], num_bytes: int) -> int:
    written = num_rows = 0
    with file.open("wb") as output:
        while written < num_bytes:
            written += output.write(json.dumps(next(rows), ensure_ascii=False).encode() + b"\n")
            num_rows += 1
    return num_rows
