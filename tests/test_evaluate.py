"""Evaluation: what counts as an answer, and a small model that says known things."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy.stats import binomtest
from typer.testing import CliRunner

from minimind.chat.answers import (
    answer_like,
    before_tags,
    find_answer,
    is_full_sentence,
    is_number,
    normalise,
    thought_of,
)
from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.compute.precision import DType
from minimind.datasets.formats import BadRowError
from minimind.errors import UserError
from minimind.evaluation.evaluate import (
    EvaluateConfig,
    Prediction,
    evaluate,
    text_bits_per_byte,
)
from minimind.evaluation.likelihood import Fork, branch_likelihoods, branch_logprobs
from minimind.evaluation.wilson import effective_trials, wilson_interval
from minimind.metrics import Number
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.transformer import ModelConfig, PackedTokens, Transformer
from minimind.tasks.problem import Problem, read_problems
from stages.evaluate import app
from tests.tiny import VOCAB_SIZE, tiny_model

# ---- what an output says ----


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("7", "7"),
        ("Tom now has 12 apples.", "12"),
        ("小明现在有12个苹果。", "12"),
        ("3+4=7, 7-2=5", "5"),
        ("5-2", None),  # a difference, or a range
        ("(5)-2", None),
        ("it is -2", "-2"),
        ("是-2。", "-2"),
        ("x=-2", "-2"),
        ("$1,000", "1000"),
        ("12,345,678 in all", "12345678"),
        ("3,45", None),
        ("1,2345", None),
        ("It costs 18.00.", "18"),
        ("0.50", "0.5"),
        ("007", "7"),
        ("<think>3+4=7</think>\n<answer>9</answer>", "9"),
        ("<answer> 1,000 apples </answer> or 3", "1000"),
        ("<answer>\nfive\n</answer> or 3", "five"),
        ("<answer>5</answer><answer>6</answer>", "6"),  # two pairs: the last number
        ("<answer>5</answer> then <answer>6", "6"),
        ("</answer>5<answer>", "5"),
        ("<think>3+4=7", "7"),
        ("none at all", None),
        ("<answer> </answer>", None),
        ("", None),
    ],
)
def test_answers_are_found(output: str, answer: str | None) -> None:
    found = find_answer(output)
    assert (found.value if found else None) == answer
    if found:
        assert normalise(output[found.start : found.end]) == found.value


@pytest.mark.parametrize(
    ("output", "said"),
    [("92</think>", "92"), ("7", "7"), ("7\n<think>8", "7\n"), ("<think>7</think>", "")],
)
def test_raw_text_is_answered_before_any_tag(output: str, said: str) -> None:
    assert before_tags(output) == said


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", True), ("-2.50", True), ("1,000", True), ("7 ", False), ("x7", False), ("", False)],
)
def test_numbers_are_told_from_other_answers(text: str, expected: bool) -> None:
    assert is_number(text) == expected


@pytest.mark.parametrize(
    ("expected", "output", "answer"),
    [
        ("5", "apples: 3+5", None),
        ("5", "many", None),
        ("apples: 3+5", " apples: 3+5\n", "apples: 3+5"),
        ("apples: 3+5", "5", "5"),
        ("apples: 3+5", "it is apples: 3+5", "it is apples: 3+5"),
        ("five", "<think>3</think>\n<answer> five </answer>", "five"),
        ("five", "<answer>five</answer><answer>", None),  # guesses
        ("5", "<answer>4</answer><answer>5</answer>", None),
        ("5", "<think>5", None),  # what was only thought
        ("5", "<answer>5 apples</answer>", "5"),
        ("five", "", ""),
    ],
)
def test_an_output_is_read_as_the_expected_answer_is(
    expected: str, output: str, answer: str | None
) -> None:
    assert answer_like(expected, output) == answer


@pytest.mark.parametrize(
    ("output", "thought"),
    [
        ("<think>3+4=7</think>\n<answer>7</answer>", "3+4=7"),
        ("\n<think>\n3\n</think> <answer>\n7\n</answer>\n", "\n3\n"),
        ("<think>3</think><answer>7</answer> apples", None),
        ("<think>3</think> so <answer>7</answer>", None),
        ("<think>3</think>\n<answer>7", None),
        ("<think></think>\n<answer>7</answer>", None),
        ("<think>3</think>\n<answer> </answer>", None),
        ("<answer>7</answer>\n<think>3</think>", None),
        ("<think>1</think><think>3</think>\n<answer>7</answer>", None),
        ("<think>3</think>\n<answer>7</answer><answer>8</answer>", None),
        ("7", None),
    ],
)
def test_thoughts_are_complete_or_none(output: str, thought: str | None) -> None:
    assert thought_of(output) == thought


FULL = "Tom now has 12 apples."


@pytest.mark.parametrize(
    ("output", "full", "expected"),
    [
        (FULL, FULL, True),
        ("Tom now has 7 apples.", FULL, True),  # wrong, but a sentence
        ("Tom now has 1,234 apples.\n", FULL, True),
        ("Amy now has 12 apples.", FULL, False),
        ("Tom now has 12 apples", FULL, False),
        ("Tom now has apples.", FULL, False),
        ("12", FULL, False),
        ("12.", None, False),
        ("12 apples", None, False),
        ("He has 12.", None, True),
        ("他有12个。", None, True),
        ('He said "12 apples!"', None, True),
        ("<think>He has 12.</think>\n<answer>12</answer>", None, False),
        ("<think>He has 12.", None, False),
        ("<think>3</think> He has 12.", None, True),
        ("", None, False),
    ],
)
def test_full_sentences(output: str, full: str | None, expected: bool) -> None:
    assert is_full_sentence(output, full) == expected


@pytest.mark.parametrize(
    ("successes", "num_trials"), [(0, 5), (5, 5), (1, 1), (3, 10), (487, 500), (500, 500)]
)
def test_wilson_intervals_are_scipys(successes: int, num_trials: int) -> None:
    expected = binomtest(successes, num_trials).proportion_ci(method="wilson")
    assert wilson_interval(successes / num_trials, num_trials) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_answers_to_one_problem_count_as_often_as_they_differ() -> None:
    def trials(rights: list[list[bool]]) -> float:
        """A list of answers for each problem."""
        problems = [f"{i}" for i, answers in enumerate(rights) for _ in answers]
        return effective_trials([right for answers in rights for right in answers], problems)

    assert trials([[True], [False], [True]]) == 3, "one answer each: each is a trial"
    alike = [[i < 6] * 4 for i in range(20)]
    assert trials(alike) == 20, "always the same: as many as problems"
    independent = [[True, False, False, True], [False, True, True, False]] * 10
    assert trials(independent) == 80, "as much as if they were of 80 problems, and never more"
    half = [[True] * 4] * 5 + [[True, False] * 2] * 10 + [[False] * 4] * 5
    assert trials(half) == pytest.approx(0.25 / (10 * 4 / 80**2 * 20 / 19))
    assert trials([[True] * 4] * 20) == 20, "nothing to estimate it from"
    assert trials([[True, False, True]]) == 1


# ---- likelihoods ----


@pytest.mark.parametrize("shared_from", [2, 64])
def test_branches_are_scored_as_whole_rows_apart(
    monkeypatch: pytest.MonkeyPatch, shared_from: int
) -> None:
    """Whatever forks share with those beside them."""
    monkeypatch.setattr("minimind.evaluation.likelihood.SHARED_FROM", shared_from)
    model = tiny_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    likeliest = int(row_logits(model, [20, 21])[-1].argmax())
    forks = [
        Fork([5, 6, 7], [[8], [9, 10, 11], [12, 13]]),
        Fork([20], [[21, 22, 23, 24]]),
        Fork([30, 31, 32, 33, 34], [[35, 36], [36, 35]]),
        Fork([30, 31, 32, 37], [[38], [39]]),
        Fork([30, 31, 32], [[33, 34]]),
        Fork([20, 21], [[likeliest], [likeliest + 1], [likeliest, 3]]),
    ]
    for fork, found in zip(forks, branch_likelihoods(model, forks, "float32"), strict=True):
        for branch, (logprob, is_greedy) in zip(fork.branches, found, strict=True):
            row = [*fork.prefix, *branch]
            logprobs = row_logprobs(model, row)[len(fork.prefix) - 1 :]
            assert logprob == pytest.approx(float(logprobs.sum()), rel=1e-5)
            greedy = row_logits(model, row).argmax(-1)[len(fork.prefix) - 1 : -1]
            assert is_greedy == (greedy.tolist() == list(branch))
    assert found[0].is_greedy


def test_what_prefixes_begin_with_is_computed_once() -> None:
    model, beginning = tiny_model().eval(), [*range(3, 73)]
    forks = [Fork([*beginning, 80 + n], [[5], [6], [7]]) for n in range(9)]
    computed = []
    model.model.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    branch_logprobs(model, forks, "float32")
    assert computed == [len(beginning) + len(forks)]


def row_logits(model: Transformer, row: list[int]) -> torch.Tensor:
    """Of what follows each token, by the packed model."""
    length = len(row)
    boundaries = torch.tensor([0, length], dtype=torch.int32)
    tokens = PackedTokens(torch.tensor(row), torch.arange(length), boundaries, length)
    with torch.no_grad():
        return model(tokens, torch.arange(length)).logits


def row_logprobs(model: Transformer, row: list[int]) -> torch.Tensor:
    """Of each token but the first."""
    return -F.cross_entropy(row_logits(model, row)[:-1], torch.tensor(row[1:]), reduction="none")


def test_rows_fork_where_they_differ() -> None:
    assert Fork.of_rows([[1, 2, 3, 4], [1, 2, 5]]) == Fork([1, 2], [[3, 4], [5]])
    # A row that another begins with keeps its last token: no branch is empty.
    assert Fork.of_rows([[1, 2], [1, 2, 3]]) == Fork([1], [[2], [2, 3]])


def test_batches_do_not_change_likelihoods(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().eval()
    forks = [Fork([5, n], [[7, n], [8]]) for n in range(3, VOCAB_SIZE)]
    expected = branch_logprobs(model, forks, "float32")
    monkeypatch.setattr("minimind.evaluation.likelihood.TOKENS_AT_A_TIME", 11)
    torch.testing.assert_close(branch_logprobs(model, forks, "float32"), expected)


def test_likelihoods_attend_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in bfloat16, whose attention is slow on CPU: autocast must not cast back."""
    attend = F.scaled_dot_product_attention
    seen = []

    def spy(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = attend(query, *args, **kwargs)
        seen.append((query.dtype, out.dtype))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    branch_logprobs(tiny_model().eval(), [Fork([5, 6], [[7, 8], [9]])], "bfloat16")
    assert set(seen) == {(torch.float32, torch.float32)}


# ---- a model that has learnt some rows by heart ----

LONG = "1 and 2 and " * 20
CHATS = [  # question, what the model says, the row's other keys
    ("How many are 3+4?", "7", {"answer": "7", "choices": ["9", "7", "17"], "label": 1}),
    (
        "How many apples does Tom have?",
        "Tom now has 9 apples.",
        {
            "answer": "8",
            "full": "Tom now has 8 apples.",
            "choices": ["8", "9", "10"],
            "label": 0,
        },
    ),
    (
        "小明现在有多少个苹果？",
        "<think>3+4=7，7-2=5</think>\n<answer>5</answer>",
        {"answer": "5", "level": 2, "choices": ["6", "7", "5", "3"], "label": 2},
    ),
    ("Say it all.", LONG, {"answer": "3", "level": 2}),
]
STORIES = [  # beginning, how it goes on, answer
    ("Tom has 3 apples. Tom now has", " 3 apples.\nAmy has 8 books.\n3+4=7", "3"),
    ("小明有5个苹果。小明现在有", "6个苹果。\n7-2=5", "5"),
]
EQUATIONS = [("2+6=", "8\n3+5=9", "8"), ("9-3=", "5", "6")]  # raw text, as STORIES are
FORMULAS = [  # question, what the model says, answer
    ("3 apples and 4 more, as a formula?", "apples: 3+4", "apples: 3+4"),
    ("7 books less 2, as a formula?", "books: 9-2", "books: 7-2"),
]
MAX_NEW_TOKENS = 48


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and beside it the problems and the text it has learnt by heart."""
    folder = tmp_path_factory.mktemp("learnt")
    chat_rows: list[dict[str, object]] = [
        {"level": 1, "prompt": prompt, **rest} for prompt, _, rest in CHATS
    ]
    write_jsonl(folder / "problems.jsonl", chat_rows)
    text_rows: list[dict[str, object]] = [
        {"prompt": "?", "completion_prompt": start, "answer": answer, "choices": ["3", "5"]}
        | {"label": 0 if answer == "3" else 1}
        for start, _, answer in STORIES
    ]
    write_jsonl(folder / "stories.jsonl", text_rows)
    task_rows: list[dict[str, object]] = [
        {"task": "equation", "as_text": True, "prompt": start, "answer": answer}
        | {"choices": ["8", "6", "5"], "label": "865".index(answer), "level": 1}
        for start, _, answer in EQUATIONS
    ]
    task_rows += [
        {"task": "extraction", "prompt": prompt, "answer": answer} for prompt, _, answer in FORMULAS
    ]
    write_jsonl(folder / "tasks.jsonl", task_rows)
    texts = [start + rest for start, rest, _ in [*STORIES, *EQUATIONS]]
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in texts])

    replies = [(prompt, reply) for prompt, reply, _ in [*CHATS, *FORMULAS]]
    corpus = [*texts, *(prompt + reply for prompt, reply in replies)]
    save_tokenizer(train_tokenizer(corpus, 320), folder / "tokenizer")
    tokenizer = ChatTokenizer.load(folder / "tokenizer")
    chats = tokenizer.encode_chats([chat(prompt, reply) for prompt, reply in replies])
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_positions=256,
            rope_theta=1e4,
            norm_eps=1e-5,
            num_experts=0,
            num_experts_per_token=2,
            num_shared_experts=1,
            router_aux_loss_coef=0.1,
        )
    )
    model.initialize(0)
    learn_by_heart(model, [row.ids for row in chats + tokenizer.encode_documents(texts)])
    save_checkpoint(folder / "checkpoint", model, folder / "tokenizer")
    (folder / "params.yaml").write_text(
        f"evaluate: {{batch_size: 3, max_new_tokens: {MAX_NEW_TOKENS}, dtype: float32, "
        "text_checkpoints: [raw]}\n"
    )
    return folder


def chat(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def learn_by_heart(model: Transformer, rows: list[list[int]]) -> None:
    lengths = torch.tensor([len(row) for row in rows])
    ends = lengths.cumsum(0)
    tokens = PackedTokens(
        torch.tensor([token for row in rows for token in row]),
        torch.cat([torch.arange(length) for length in lengths]),
        F.pad(ends, (1, 0)).int(),
        int(lengths.max()),
    )
    targets = tokens.ids.roll(-1)
    targets[ends - 1] = -100
    # Which of the rows it is, nobody can know: that alone is ln(rows) for each of them.
    least = len(rows) * math.log(len(rows)) / int((targets >= 0).sum())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        logits = model(tokens, torch.arange(len(tokens.ids))).logits
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < least + 0.01:
            return
    raise AssertionError(f"not learnt: the loss is still {loss.item()}")


def with_data(folder: Path, output: Path, problems: Path, text: Path) -> Path:
    """The parameters of a folder, with what to evaluate on."""
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["data"] = {"problems": str(problems), "text": str(text)}
    file = output / "evaluated.yaml"
    file.write_text(yaml.safe_dump(params), encoding="utf-8")
    return file


def run(
    folder: Path, name: str, problems: str, output: Path
) -> tuple[dict[str, Number], list[Prediction]]:
    params = with_data(folder, output, folder / problems, folder / "text.jsonl")
    result = CliRunner().invoke(
        app,
        [
            *("--checkpoint", f"{folder / 'checkpoint'}", "--name", name),
            *("--metrics", f"{output / 'metrics.json'}"),
            *("--predictions", f"{output / 'predictions.jsonl'}"),
            *("--choices", f"{output / 'choices.csv'}"),
            *("--params", f"{params}"),
        ],
    )
    assert result.exit_code == 0, result.output
    metrics = json.loads((output / "metrics.json").read_text())
    rows = (output / "predictions.jsonl").read_text("utf-8").splitlines()
    assert list(metrics) == [name]
    return metrics[name], [Prediction(**json.loads(row)) for row in rows]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)


def test_a_chat_model_is_asked_and_scored(learnt: Path, tmp_path: Path) -> None:
    metrics, predictions = run(learnt, "chatty", "problems.jsonl", tmp_path)
    said = [prediction.output for prediction in predictions]
    assert said[:3] == [reply for _, reply, _ in CHATS][:3]
    assert LONG.startswith(said[3]) and len(said[3]) > 30
    assert [p.parsed for p in predictions] == ["7", "9", "5", None]  # the last is a list
    assert [p.correct for p in predictions] == [True, False, True, False]
    assert [p.choice for p in predictions] == ["7", "9", "5", None]
    assert [p.choice_correct for p in predictions] == [True, False, True, None]
    assert [p.id for p in predictions] == ["1", "2", "3", "4"]
    length = metrics.pop("thinking_tokens")
    tokenizer = ChatTokenizer.load(learnt / "checkpoint")
    assert 0 <= metrics.pop("text_bits_per_byte") < 0.2  # of chat models, too
    assert (tmp_path / "choices.csv").read_text() == "right,chosen\nB,B\nA,B\nC,C\n"
    assert length == len(tokenizer.encode_text("3+4=7，7-2=5"))
    assert metrics == {
        "exact_l1": 0.5,
        "exact_l2": 0.5,
        "choice": 0.666667,
        "in_form": 0.5,
        "complete_think": 0.25,
        "full_sentence": 0.25,
        "unfinished": 0.25,
    }


def test_each_choice_is_scored_as_a_whole_row(
    learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, output with the choice in it, and what ends an output: of chats and texts in turn."""
    files = ("problems.jsonl", "tasks.jsonl")
    chats, tasks = ((learnt / file).read_text("utf-8").splitlines(True) for file in files)
    (tmp_path / "mixed.jsonl").write_text("".join([chats[0], tasks[0], chats[1], tasks[1]]))
    scored: list[list[str]] = []
    tokenizer = ChatTokenizer.load(learnt / "checkpoint")

    def spy(model: Transformer, forks: list[Fork], dtype: DType) -> list[list[float]]:
        whole = [[[*fork.prefix, *branch] for branch in fork.branches] for fork in forks]
        scored.extend([[tokens_of(tokenizer, row) for row in rows] for rows in whole])
        return branch_logprobs(model, forks, dtype)

    monkeypatch.setattr("minimind.evaluation.evaluate.branch_logprobs", spy)
    run(learnt, "chatty", str(tmp_path / "mixed.jsonl"), tmp_path)

    def chat_rows(question: str, replies: list[str]) -> list[str]:
        start, end = "<|im_start|>", "<|im_end|>"
        return [
            f"{start}user\n{question}{end}\n{start}assistant\n{reply}{end}" for reply in replies
        ]

    assert scored[:4] == [  # behind them the held-out text
        chat_rows(CHATS[0][0], ["9", "7", "17"]),
        ["<|im_start|>2+6=8\n", "<|im_start|>2+6=6\n", "<|im_start|>2+6=5\n"],
        chat_rows(CHATS[1][0], [f"Tom now has {n} apples." for n in (8, 9, 10)]),
        ["<|im_start|>9-3=8\n", "<|im_start|>9-3=6\n", "<|im_start|>9-3=5\n"],
    ]


def tokens_of(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    """All of a row's text, control tokens too."""
    names = {tokenizer.start_id: "<|im_start|>", tokenizer.end_id: "<|im_end|>"}
    return "".join(names.get(token) or tokenizer.decode([token]) for token in ids)


def test_a_text_model_goes_on_and_its_first_line_counts(learnt: Path, tmp_path: Path) -> None:
    metrics, predictions = run(learnt, "raw", "stories.jsonl", tmp_path)
    assert [p.output for p in predictions] == [" 3 apples.", "6个苹果。"]
    assert [p.prompt for p in predictions] == [start for start, _, _ in STORIES]
    assert [p.correct for p in predictions] == [True, False]
    assert predictions[0].choice == "3"
    assert metrics["exact"] == 0.5
    assert metrics["unfinished"] == 0
    assert metrics["thinking_tokens"] == 0
    assert 0 <= metrics["text_bits_per_byte"] < 0.2


@pytest.mark.parametrize("question", [0, 1])  # answered by a number, by a sentence
def test_an_answer_that_is_cut_off_is_in_no_form(learnt: Path, question: int) -> None:
    model, tokenizer = load_model(learnt / "checkpoint"), ChatTokenizer.load(learnt / "checkpoint")
    asked, reply, _ = CHATS[question]
    problem = replace(Problem.of(asked, "7"), full=reply if question else None)
    length = len(tokenizer.encode_text(reply))
    for is_cut in (True, False):
        config = EvaluateConfig(max_new_tokens=length + (not is_cut))  # its end is a token, too
        metrics, (prediction,) = evaluate(model, tokenizer, [problem], config=config)
        assert prediction.output == reply
        assert metrics["unfinished"] == is_cut
        assert metrics["in_form"] == (not is_cut)
        assert metrics["full_sentence"] == (not is_cut and question)


@pytest.mark.parametrize("name", ["chatty", "raw"])
def test_a_task_has_metrics_of_its_own(learnt: Path, tmp_path: Path, name: str) -> None:
    rows = [(learnt / f"{file}.jsonl").read_text("utf-8") for file in ("tasks", "problems")]
    (tmp_path / "all.jsonl").write_text("".join(rows), "utf-8")
    metrics, predictions = run(learnt, name, str(tmp_path / "all.jsonl"), tmp_path)
    equations, formulas = predictions[:2], predictions[2:4]
    # Asked as raw text of both; what follows a line break is no part of the answer.
    assert [p.output for p in equations] == ["8", "5"]
    assert [p.prompt for p in equations] == [start for start, _, _ in EQUATIONS]
    assert all(p.finished for p in equations)
    assert [p.choice for p in equations] == ["8", "5"]
    assert metrics["exact_equation"] == metrics["choice_equation"] == 0.5
    assert "choice_extraction" not in metrics
    assert [p.task for p in predictions] == ["equation"] * 2 + ["extraction"] * 2 + [None] * 4
    if name == "chatty":
        assert [p.output for p in formulas] == [said for _, said, _ in FORMULAS]
        assert [p.parsed for p in formulas] == ["apples: 3+4", "books: 9-2"]
        assert metrics["exact_extraction"] == 0.5
        stories, _ = run(learnt, name, "problems.jsonl", tmp_path)
        assert {k: v for k, v in metrics.items() if k in stories} == stories
        names = ["exact_l1", "exact_l2", "exact_equation", "exact_extraction", "choice"]
        assert list(metrics)[:6] == [*names, "choice_equation"]


def test_tasks_alone_say_nothing_of_form(learnt: Path, tmp_path: Path) -> None:
    metrics, _ = run(learnt, "chatty", "tasks.jsonl", tmp_path)
    names = {"exact_equation", "exact_extraction", "choice_equation", "text_bits_per_byte"}
    assert set(metrics) == names


def test_a_line_break_of_several_tokens_ends_no_output(
    learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them may stand elsewhere: then the output would be cut off too early."""
    model, tokenizer = load_model(learnt / "checkpoint"), ChatTokenizer.load(learnt / "checkpoint")
    problems = read_problems(learnt / "stories.jsonl")
    config = EvaluateConfig(
        batch_size=3, max_new_tokens=MAX_NEW_TOKENS, dtype="float32", text_checkpoints=[]
    )
    expected = evaluate(model, tokenizer, problems, [], config, as_text=True)
    encode, inside = tokenizer.encode_text, tokenizer.encode_text(" 3")[-1:]
    monkeypatch.setattr(
        tokenizer, "encode_text", lambda t: encode(t) + inside if t == "\n" else encode(t)
    )
    assert evaluate(model, tokenizer, problems, [], config, as_text=True) == expected


def test_the_same_bytes_twice(learnt: Path, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        run(learnt, "chatty", "problems.jsonl", tmp_path / folder)
    for file in ("metrics.json", "predictions.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_batches_do_not_change_predictions(learnt: Path) -> None:
    model, tokenizer = load_model(learnt / "checkpoint"), ChatTokenizer.load(learnt / "checkpoint")
    problems = read_problems(learnt / "problems.jsonl")
    alone, together = (
        evaluate(
            model,
            tokenizer,
            problems,
            [],
            EvaluateConfig(
                batch_size=size,
                max_new_tokens=MAX_NEW_TOKENS,
                dtype="float32",
                text_checkpoints=[],
            ),
            as_text=False,
        )
        for size in (1, 10)
    )
    assert alone == together


def test_bits_per_byte_are_those_of_the_packed_model(learnt: Path) -> None:
    tokenizer = ChatTokenizer.load(learnt / "tokenizer")
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_positions=20)
    texts = ["Tom has 3 apples.", "小明有5个苹果。" * 20]
    rows = [tokenizer.encode_document(text)[0][:20] for text in texts]
    assert len(rows[0]) < 20 == len(rows[1]), "one is cut, one is not"
    logprobs = torch.cat([row_logprobs(model, row) for row in rows])
    num_bytes = sum(len(tokenizer.decode(row).encode()) for row in rows)
    found = text_bits_per_byte(model, tokenizer, texts, "float32")
    assert found == pytest.approx(-float(logprobs.sum()) / math.log(2) / num_bytes, rel=1e-5)
    whole = text_bits_per_byte(model, tokenizer, texts[:1], "float32")
    num_tokens = len(rows[0]) - 1
    guessed = num_tokens * math.log2(tokenizer.vocab_size) / len(texts[0].encode())
    assert whole == pytest.approx(guessed, rel=0.1), "an untrained model knows nothing"


def test_weights_out_of_bounds_are_one_line(learnt: Path, tmp_path: Path) -> None:
    model = load_model(learnt / "checkpoint")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    tokenizer = ChatTokenizer.load(learnt / "checkpoint")
    with pytest.raises(UserError, match="nan bits per byte; the checkpoint's weights"):
        text_bits_per_byte(model, tokenizer, ["3+4=7"], "float32")


# ---- people's mistakes ----


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"}', "answer is missing"),
        ('{"answer": "a"}', "prompt is missing; the keys found are 'answer'"),
        ('{"prompt": "", "answer": "1"}', "prompt"),
        ('{"prompt": "a", "answer": null}', "answer"),
        ('{"prompt": "a", "answer": "1", "level": "hard"}', "level is 'hard'; it should be"),
        ('{"prompt": "a", "answer": "1", "task": "Sums"}', "task is 'Sums'; it must be lower-case"),
        ('{"prompt": "a", "answer": "1", "task": "my sums"}', "task"),
        ('{"prompt": "a", "answer": "1", "task": ""}', "task"),
        ('{"prompt": "a", "answer": "1", "as_text": "perhaps"}', "as_text"),
        ('{"prompt": "a", "answer": "1", "choices": ["1"], "label": 0}', "two or more"),
        ('{"prompt": "a", "answer": "1", "choices": ["1", "1"], "label": 0}', "different"),
        ('{"prompt": "a", "answer": "1", "choices": ["1", "2"]}', "label is None"),
        ('{"prompt": "a", "answer": "1", "choices": ["1", "2"], "label": 2}', "0 to 1"),
        ('{"conversations": [{"role": "user", "content": "5?"}]}', "assistant"),
        ('{"conversations": [{"role": "assistant", "content": "5"}]}', "assistant turn"),
        ("[1]", "JSON object"),
        ('{"prompt": ', "JSON"),
    ],
)
def test_bad_problems_name_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "a", "answer": "1"}\n\n' + line + "\n")
    with pytest.raises(BadRowError, match=reason) as caught:
        read_problems(file)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert "\n" not in str(caught.value)


def test_answers_may_be_numbers_and_chats_may_be_problems(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "problems.jsonl",
        [
            {"prompt": "a", "answer": 18, "id": 7},
            {
                "conversations": [
                    {"role": "system", "content": "Think."},
                    *chat("b", "<think>1</think>\n<answer>1,000</answer>"),
                ]
            },
        ],
    )
    one, other = read_problems(file)
    assert (one.id, one.prompt, one.answer) == ("7", "a", "18")
    assert (other.id, other.prompt, other.answer) == ("2", "b", "1000")
    assert [message["role"] for message in other.messages] == ["system", "user"]


def invoke(folder: Path, **changes: Path) -> str:
    """The one line with which the stage ends."""
    data = {"problems": folder / "problems.jsonl", "text": folder / "text.jsonl"}
    data |= {key: path for key, path in changes.items() if key in data}
    options = {
        "checkpoint": folder / "checkpoint",
        "params": with_data(folder, Path(), **data),
    } | {key: path for key, path in changes.items() if key not in data}
    arguments = [text for key, value in options.items() for text in (f"--{key}", f"{value}")]
    result = CliRunner().invoke(
        app, ["--name", "x", "--metrics", "m.json", "--predictions", "p.jsonl", *arguments]
    )
    assert result.exit_code == 1, result.output
    assert not Path("m.json").exists() and not Path("p.jsonl").exists()
    (line,) = result.stderr.splitlines()
    return line


def test_misuse_is_one_line(learnt: Path, tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "word " * 300, "answer": "1"}])
    assert f"{long}:1: the prompt has" in invoke(learnt, problems=long)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": }\n')
    assert f"{broken}:2: " in invoke(learnt, text=broken)
    assert "is missing" in invoke(learnt, problems=tmp_path / "no.jsonl")
    assert "is missing" in invoke(learnt, checkpoint=tmp_path / "nowhere")
    params = tmp_path / "p.yaml"
    params.write_text("evaluate: {batch_size: 0, max_new_tokens: 0, dtype: float32}\n")
    line = invoke(learnt, params=params)
    assert "evaluate.batch_size is 0" in line and "evaluate.max_new_tokens is 0" in line


def test_a_tokenizer_too_large_for_the_model_is_one_line(learnt: Path, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=100)
    save_checkpoint(tmp_path / "other", model, learnt / "tokenizer")
    assert "do not belong together" in invoke(learnt, checkpoint=tmp_path / "other")
