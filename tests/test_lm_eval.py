"""lm-evaluation-harness: our backend gives what its own gives for the same checkpoint."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.errors import UserError
from minimind.model.checkpoint import save_checkpoint
from stages.lm_eval import app
from tests.graph import ROOT
from tests.tiny import tiny_model

pytest.importorskip("lm_eval", reason="extra lm-eval")
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from minimind.evaluation.harness import LmEvalConfig, MiniMindLM, judge, read_splits

FORMS = ["ceval_form", "cmmlu_form", "gsm8k_form"]
MAX_POSITIONS = 400
LONG = "小明有3盒苹果，每盒4个。\n" * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that no two choices are nearly alike."""
    folder = tmp_path_factory.mktemp("checkpoint")
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "lm-eval/data").iterdir()]
    save_tokenizer(train_tokenizer(texts, 600), folder / "tokenizer")
    vocab_size = ChatTokenizer.load(folder / "tokenizer").vocab_size
    model = tiny_model(vocab_size=vocab_size, max_positions=MAX_POSITIONS)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    save_checkpoint(folder / "model", model, folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> MiniMindLM:
    return MiniMindLM(checkpoint)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> HFLM:
    return HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(autouse=True)
def at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DVC_ROOT", f"{tmp_path}")  # where records go
    monkeypatch.delenv("DVC_STAGE", raising=False)


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each, task_name="test") for each in arguments]


def test_likelihoods_are_those_of_hf(ours: MiniMindLM, theirs: HFLM) -> None:
    chat = ours.apply_chat_template([{"role": "user", "content": "2+3=?"}])
    assert chat == theirs.apply_chat_template([{"role": "user", "content": "2+3=?"}])
    contexts = ["答案：", "", "Question: 1+1=?\nAnswer:  ", chat, LONG, LONG + "又买了2个。"]
    pairs = [(context, f" {letter}") for context in contexts for letter in "ABCD"]
    pairs += [(context, " 5 apples.\n") for context in contexts] + [("<|im_start|>", "5"), pairs[0]]
    found = ours.loglikelihood(asked(*pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(asked(*pairs), disable_tqdm=True)
    for pair, (logprob, is_greedy), (their_logprob, their_is_greedy) in zip(
        pairs, found, expected, strict=True
    ):
        assert logprob == pytest.approx(their_logprob, rel=1e-5), pair
        assert is_greedy == their_is_greedy, pair


def test_whole_texts_are_scored_as_by_hf(ours: MiniMindLM, theirs: HFLM) -> None:
    texts = [("12+3=15\n",), (LONG,), ("小明有3个苹果。",)]
    assert len(ours.tok_encode(LONG)) > MAX_POSITIONS, "in two windows"
    found = ours.loglikelihood_rolling(asked(*texts))
    assert found == pytest.approx(theirs.loglikelihood_rolling(asked(*texts), True), rel=1e-5)


def test_answers_are_those_of_hf(ours: MiniMindLM, theirs: HFLM) -> None:
    def requests() -> list[Any]:  # anew: the harness adds to their lists
        short = {"until": ["5", "\n\n"], "max_gen_toks": 9, "do_sample": False}
        long: dict[str, Any] = {"until": "个", "max_new_tokens": 30, "temperature": 0.0}
        contexts = ["Question: 1+1=?\nAnswer:", "小明有5个苹果。", LONG, "3"]
        return asked(*((context, options) for options in (short, long) for context in contexts))

    found = ours.generate_until(requests())
    assert found == theirs.generate_until(requests(), disable_tqdm=True)
    assert any(found)


@pytest.mark.parametrize("chat", [False, True])
def test_the_metrics_are_those_of_hf(ours: MiniMindLM, theirs: HFLM, chat: bool) -> None:
    config = LmEvalConfig(tasks=FORMS, num_fewshot=2, limit=6, apply_chat_template=chat)
    (metrics, table), (expected, _) = (
        judge(model, "x", config, ROOT / "lm-eval/tasks") for model in (ours, theirs)
    )
    assert metrics == expected
    assert "ceval_form" in table
    assert {*metrics} >= {
        *("ceval_form_acc", "cmmlu_form_acc", "gsm8k_form_exact_match_strict"),
        *("ceval_form_acc_stderr", "gsm8k_form_exact_match_flexible"),
    }


class Gold(LM):  # type: ignore[misc]
    """Says what the samples say."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        said = [request.doc.get("answer") or request.doc["Answer"] for request in requests]
        return [(-float("ABCD"[r.idx] != a), True) for r, a in zip(requests, said, strict=True)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [request.doc["answer"] for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        raise NotImplementedError


def test_the_samples_own_answers_score_full_marks() -> None:
    metrics, _ = judge(Gold(), "gold", LmEvalConfig(tasks=FORMS), ROOT / "lm-eval/tasks")
    scores = {name: value for name, value in metrics.items() if not name.endswith("stderr")}
    assert len(scores) == 4 and {*scores.values()} == {1.0}


def run(checkpoint: Path, folder: Path, **changes: Any) -> Any:
    section = {"tasks": ["ceval_form"], "limit": 2, "dtype": "float32"} | changes
    (folder / "params.yaml").write_text(yaml.safe_dump({"lm_eval": section}), encoding="utf-8")
    arguments = ["--checkpoint", f"{checkpoint}", "--name", "raw", "--params"]
    arguments += [f"{folder / 'params.yaml'}", "--tasks", f"{ROOT / 'lm-eval/tasks'}"]
    arguments += ["--data", f"{ROOT / 'lm-eval/data'}", "--metrics", f"{folder / 'metrics.json'}"]
    return CliRunner().invoke(app, arguments)


def test_the_stage_writes_metrics_below_the_checkpoints_name(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = run(checkpoint, tmp_path)
    assert result.exit_code == 0, result.output
    assert "ceval_form" in result.stdout
    (metrics,) = json.loads((tmp_path / "metrics.json").read_text()).items()
    assert metrics[0] == "raw" and 0 <= metrics[1]["ceval_form_acc"] <= 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["cval_form"]}, "there is no task cval_form; .* has ceval_form, cmmlu_form"),
        ({"tasks": []}, "lm_eval.tasks is \\[\\]"),
        ({"limit": 0}, "lm_eval.limit is 0; it should be greater than 0"),
        ({"num_shots": 5}, "lm_eval.num_shots is not a known key"),
    ],
)
def test_wrong_parameters_are_one_line(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    result = run(checkpoint, tmp_path, **changes)
    assert result.exit_code == 1
    assert re.search(said, result.stderr) and result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "metrics.json").exists()


def test_without_the_extra_it_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.lm_eval.find_spec", lambda name: None)
    result = run(checkpoint, tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "lm_eval: lm_eval is missing; pip install 'minimind-dvc[lm-eval]'.\n"


def test_what_the_model_cannot_do_is_one_line(ours: MiniMindLM) -> None:
    with pytest.raises(UserError, match="asks for sampling; only greedy"):
        ours.generate_until(asked(("1", {"until": [], "do_sample": True, "temperature": 1.0})))
    with pytest.raises(UserError, match="asks for 400 new tokens; the model has 400 positions"):
        ours.generate_until(asked(("1", {"until": [], "max_gen_toks": MAX_POSITIONS})))
    with pytest.raises(UserError, match=r"to be scored has \d+ tokens; the model has 400"):
        ours.loglikelihood(asked(("1", LONG)), disable_tqdm=True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"question,A\n2+2,4\n1+1,\n", "a.csv:3: there is no A; the row has"),
        ("a.csv", b"Question,A\n2+2,4\n", "a.csv:2: there is no question; the row has 'Question'"),
        ("a.csv", b"question,A\n\xff,4\n", "a.csv is not UTF-8 (byte 11); save it"),
        ("a.csv", b"question,A\n1,2\n1,2,3\n", "a.csv:3: it has more values than columns"),
        ("a.csv", b'question,A\n1,"2\n3,4\n', "a.csv:3: unexpected end"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", b"question,A\n", "a.csv has no rows"),
        ("a.jsonl", b'{"question": "1"}\n', "a.jsonl:1: there is no A; the row has"),
        ("a.jsonl", b'{"question": "1"\n', "a.jsonl:1: "),
        ("a.jsonl", b"", "a.jsonl"),
    ],
)
def test_rows_that_cannot_be_read_are_one_line(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_splits(files={"val": f"{tmp_path / name}"}, columns=["question", "A"])
    assert said in str(caught.value)


def test_values_stay_the_texts_that_they_are(tmp_path: Path) -> None:
    """With a byte order mark, as spreadsheets write it. Other columns are left out."""
    text = '\ufeffid,question,A,explanation\n0,NA,007\n1,"a,\nb",1.0,because\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    read = read_splits({"dev": f"{tmp_path / 'a.csv'}"}, ["question", "A"], version=1.0)
    rows = [{"question": "NA", "A": "007"}, {"question": "a,\nb", "A": "1.0"}]
    assert read["dev"].to_list() == rows


def test_the_graph_has_the_checkpoints_that_are_evaluated() -> None:
    graph, main = (
        yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["stages"]
        for file in ("lm-eval/dvc.yaml", "dvc.yaml")
    )
    stage = graph["lm_eval"]
    assert stage["foreach"] == main["evaluate"]["foreach"]
    assert stage["do"]["wdir"] == ".." and "outs" not in stage["do"]
    assert stage["do"]["metrics"] == [{"metrics/lm_eval/${key}.json": {"cache": False}}]
    assert [d for d in stage["do"]["deps"] if d.startswith("code/")] == ["code/lm_eval.json"]
