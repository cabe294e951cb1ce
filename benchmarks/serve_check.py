"""Whether transformers, this library and llama.cpp say the same: `make serve-check`.

    python -m benchmarks.serve_check exports/reason

Greedy answers of the exported folder and of its f16 GGUF file to twenty prompts, token by token,
up to the first token whose two best logits differ by less than 1e-2. (The first two compute in
float32, llama.cpp in float16, where the weights are.) Tokens of prompts and other texts are equal.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind.chat.tokenizer import ChatTokenizer
from minimind.errors import UserError
from minimind.exports.gguf import write_gguf
from minimind.model.checkpoint import load_model
from minimind.model.generate import generate
from minimind.report.tables import table

CLOSE = 1e-2  # logits of the two best tokens that rounding may swap
MAX_NEW_TOKENS = 128
PROMPTS = [
    *(f"Tom has {n} apples and buys {n + 3} more. How many apples are there now?" for n in (3, 48)),
    *(f"小明有{n}盒苹果，每盒{n + 1}个。现在有多少个苹果？" for n in (3, 7)),
    *(
        "1+1=?",
        "37-18=?",
        "12+34-5=?",
        "Hello!",
        "你好",
        "Who are you?",
        "你是谁？",
        "为什么天空是蓝色的？",
    ),
    *("Count from 1 to 10.", "Say nothing.", "x", "0", "Rob has 5 boxes of 4 pens and loses 3."),
    *("<think>", "<|im_end|>\n<|im_start|>system", "😀 é ²\t\n\n 3½"),
]
TEXT = [*"abc XYZ 123 \n\n\t\r你好有苹果 '’s'll!?.,;:-_😀é²½Ⅷ٣<>|", "<think>", "<|im_end|>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("exports/reason"))
    folder: Path = parser.parse_args().folder
    try:
        with TemporaryDirectory() as scratch:
            file = Path(scratch, "it.gguf")
            write_gguf(folder, file, "f16")
            failures = check(folder, file)
    except UserError as error:
        failures = [str(error)]
    sys.exit("\n".join(failures) or None)


def check(folder: Path, file: Path) -> list[str]:
    """Where they differ; prints how far the answers to each prompt agree."""
    tokenizer, ours = ChatTokenizer.load(folder), load_model(folder).eval()
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stock_tokenizer = AutoTokenizer.from_pretrained(folder)
    llama = Llama(str(file), n_ctx=ours.config.max_positions, logits_all=True, verbose=False)
    failures = [
        f"llama.cpp has other tokens for {text!r}"
        for text in texts()
        if not same(llama, tokenizer, text)
    ]
    rows = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.encode_prompt(messages)
        asked = stock_tokenizer.apply_chat_template(messages, add_generation_prompt=True)[
            "input_ids"
        ]
        if "<|" not in prompt and asked != ids:
            failures.append(f"transformers has other tokens for {prompt!r}")
        said = [answer_of_ours(ours, tokenizer, ids), answer_of_stock(stock, tokenizer, ids)]
        said.append(answer_of_llama(llama, tokenizer, ids))
        margins = margins_of(stock, ids, said[1])
        num_sure = next((n for n, margin in enumerate(margins) if margin < CLOSE), len(margins))
        agree = all(answer[:num_sure] == said[0][:num_sure] for answer in said)
        if not agree:
            failures.append(f"the answers to {prompt!r} differ before token {num_sure}")
        same_all = "whole" if len({*map(tuple, said)}) == 1 else f"to token {num_sure}"
        rows.append([prompt, str(len(said[0])), f"{min(margins):.3f}", same_all if agree else "NO"])
    print(table(["prompt", "tokens", "least margin", "same"], rows))
    print(f"{len(texts())} other texts, {len(failures)} failures")
    return failures


def texts() -> list[str]:
    """Random texts of what tokenizers stumble over."""
    rng = random.Random(1)
    return ["".join(rng.choices(TEXT, k=rng.randint(1, 40))) for _ in range(500)]


def same(llama: Llama, tokenizer: ChatTokenizer, text: str) -> bool:
    found = llama.tokenize(text.encode(), add_bos=False, special=False)
    return found == tokenizer.encode_text(text)


def answer_of_ours(model: Any, tokenizer: ChatTokenizer, ids: Sequence[int]) -> list[int]:
    options = {"max_new_tokens": MAX_NEW_TOKENS, "end_id": tokenizer.end_id}
    return generate(model, [ids], dtype="float32", **options).ids[0]


def answer_of_stock(model: Any, tokenizer: ChatTokenizer, ids: Sequence[int]) -> list[int]:
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


def answer_of_llama(llama: Llama, tokenizer: ChatTokenizer, ids: Sequence[int]) -> list[int]:
    said: list[int] = []
    llama.reset()
    llama.eval(ids)
    while len(said) < MAX_NEW_TOKENS and tokenizer.end_id not in said:
        said.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(said[-1:])
    return said


def margins_of(model: Any, ids: Sequence[int], said: Sequence[int]) -> list[float]:
    """By how much the best logit is above the next, of each token of an answer."""
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *said]])).logits[0, len(ids) - 1 : -1]
    best = logits.topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


if __name__ == "__main__":
    main()
