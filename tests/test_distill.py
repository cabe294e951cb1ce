"""White-box distillation: the loss, the teacher's cached outputs, and the two stages."""

import copy
import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from typer.testing import CliRunner, Result

from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.datasets.batches import Extra, count, pack
from minimind.datasets.encoded import EncodedDataset
from minimind.distillation.outputs import TeacherOutputs
from minimind.distillation.teacher import PaddedModel, Teacher, load_teacher
from minimind.errors import UserError
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.objectives import chunked
from minimind.objectives.distill import (
    TEACHER_IDS,
    TEACHER_LOGPROBS,
    Distill,
    bucket_logprobs,
    kl_divergence,
)
from minimind.objectives.next_token import NextToken
from stages import distill, sft, teacher_outputs
from tests.tiny import VOCAB_SIZE, random_rows, tiny_model, write_rows

TEMPERATURE = 1.5


def random_logits(num_rows: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(num_rows, VOCAB_SIZE, generator=generator)


def cached(teacher: torch.nn.Module, batch, top_k: int) -> dict[str, torch.Tensor]:
    """What the stage teacher_outputs keeps, in float32."""
    with torch.no_grad():
        logits = teacher(batch.tokens, batch.predict_at).logits
    ids = logits.topk(top_k).indices
    return {TEACHER_IDS: ids, TEACHER_LOGPROBS: bucket_logprobs(logits, ids, TEMPERATURE)}


def full_divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> np.ndarray:
    p = (teacher.double() / temperature).softmax(1).numpy()
    q = (student.double() / temperature).softmax(1).numpy()
    return (p * np.log(p / q)).sum(1)


# The loss


@pytest.mark.parametrize("top_k", [1, 7, VOCAB_SIZE - 1, VOCAB_SIZE])
def test_buckets_are_the_likeliest_tokens_and_all_others_together(top_k: int) -> None:
    logits = random_logits(5, seed=1)
    ids = logits.topk(top_k).indices
    buckets = bucket_logprobs(logits, ids, TEMPERATURE).double().exp()
    p = (logits.double() / TEMPERATURE).softmax(1)
    torch.testing.assert_close(buckets[:, :top_k], p.gather(1, ids), rtol=1e-5, atol=1e-7)
    assert buckets.shape[1] == min(top_k + 1, VOCAB_SIZE)
    if top_k < VOCAB_SIZE:
        rest = p.scatter(1, ids, 0.0).sum(1)
        torch.testing.assert_close(buckets[:, top_k], rest, rtol=1e-5, atol=1e-9)


def test_a_tiny_rest_is_not_lost_to_rounding() -> None:
    logits = torch.zeros(1, VOCAB_SIZE, requires_grad=True)
    with torch.no_grad():
        logits[0, 0] = 60.0  # the others hold 96 exp(-60), far below float32's 1 - p
    buckets = bucket_logprobs(logits, torch.tensor([[0]]), 1.0)
    assert float(buckets[0, 1].detach()) == pytest.approx(math.log(VOCAB_SIZE - 1) - 60, rel=1e-6)
    buckets[0, 1].backward()
    assert torch.isfinite(logits.grad).all()


def test_the_bucketed_divergence_is_a_lower_bound_that_rises_to_the_full_one() -> None:
    teacher, student = random_logits(40, seed=1), random_logits(40, seed=2)
    full = full_divergence(teacher, student, TEMPERATURE)
    previous = np.zeros(40)
    for top_k in (1, 2, 4, 16, 64, VOCAB_SIZE):
        ids = teacher.topk(top_k).indices
        buckets = [bucket_logprobs(logits, ids, TEMPERATURE) for logits in (teacher, student)]
        bound = kl_divergence(*buckets).double().numpy()
        assert (bound >= previous - 1e-5).all()
        assert (bound <= full + 1e-5).all()
        previous = bound
    np.testing.assert_allclose(previous, full, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_loss_is_the_plain_formula(tmp_path: Path, alpha: float) -> None:
    batch = pack(write_rows(tmp_path, random_rows(6)), np.arange(6), {})
    student, teacher = tiny_model(1), tiny_model(2, hidden_size=64)
    loss = Distill(alpha, TEMPERATURE, teacher)(student, batch, 0.0)
    with torch.no_grad():
        z = student(batch.tokens, batch.predict_at).logits.double()
        t = teacher(batch.tokens, batch.predict_at).logits.double()
    ce = -z.log_softmax(1)[range(len(z)), batch.targets].sum().item()
    kl = full_divergence(t, z, TEMPERATURE).sum()
    assert loss.terms["distill"].per == "tokens"
    assert float(loss.terms["distill"].total.detach()) == pytest.approx(
        alpha * ce + (1 - alpha) * TEMPERATURE**2 * kl, rel=1e-5
    )
    assert float(loss.metrics["ce"].total) == pytest.approx(ce, rel=1e-5)
    assert float(loss.metrics["kl"].total) == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("top_k", [7, None])
def test_many_scores_give_the_same_bits_a_few_rows_at_a_time(
    tmp_path: Path, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack(write_rows(tmp_path, random_rows(6)), np.arange(6), {})
    teacher = tiny_model(2)
    if top_k:
        batch = replace(batch, extras=cached(teacher, batch, top_k))
    objective = Distill(0.3, TEMPERATURE, None if top_k else teacher)
    results = []
    for many_logits in (2**22, 0):
        monkeypatch.setattr(chunked, "MANY_LOGITS", many_logits)
        monkeypatch.setattr(chunked, "LOGITS_AT_A_TIME", 5 * VOCAB_SIZE)
        student = tiny_model(1)
        metrics = objective(student, batch, 0.0).metrics
        values = {name: float(term.total) for name, term in metrics.items()}
        results.append((values, gradient(student, objective, [batch], 1)))
    (values, expected), (same_values, found) = results
    assert len(batch.targets) > 5
    assert same_values == values
    assert torch.equal(found, expected)


def gradient(model, objective, batches, tokens: int) -> torch.Tensor:
    for batch in batches:
        (objective(model, batch, 0.0).terms.popitem()[1].total / tokens).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_cached_whole_distributions_are_the_teacher_beside_the_student(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, random_rows(6))
    teacher = tiny_model(2)
    batch = pack(dataset, np.arange(6), {})
    tokens = batch.counts.tokens
    online = gradient(tiny_model(1), Distill(0.5, TEMPERATURE, teacher), [batch], tokens)
    batch.extras.update(cached(teacher, batch, VOCAB_SIZE))
    offline = gradient(tiny_model(1), Distill(0.5, TEMPERATURE, None), [batch], tokens)
    torch.testing.assert_close(offline, online)


def test_alpha_1_is_fine_tuning_and_the_teacher_only_measures(tmp_path: Path) -> None:
    batch = pack(write_rows(tmp_path, random_rows(6)), np.arange(6), {})
    baseline = Distill(1.0, TEMPERATURE, None)
    plain = gradient(tiny_model(1), NextToken(), [batch], batch.counts.tokens)
    # In training there is not even a teacher.
    assert torch.equal(gradient(tiny_model(1), baseline, [batch], batch.counts.tokens), plain)
    batch.extras.update(cached(tiny_model(2), batch, 8))
    measured = baseline(tiny_model(1).eval(), batch, 0.0)
    assert torch.equal(measured.terms["distill"].total, measured.metrics["ce"].total)
    assert float(measured.metrics["kl"].total) > 0


@pytest.mark.parametrize("top_k", [8, VOCAB_SIZE])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path: Path, top_k: int) -> None:
    batch = pack(write_rows(tmp_path, random_rows(6)), np.arange(6), {})
    batch.extras.update(cached(tiny_model(1), batch, top_k))
    objective = Distill(0.0, TEMPERATURE, None)
    loss = objective(tiny_model(1), batch, 0.0)
    assert float(loss.metrics["kl"].total) == pytest.approx(0.0, abs=1e-5)
    other = gradient(tiny_model(3), objective, [batch], 1).norm()
    assert gradient(tiny_model(1), objective, [batch], 1).norm() < 1e-5 * other


def test_four_micro_batches_are_one_big_batch(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path, random_rows(10))
    whole = cached(tiny_model(2), pack(dataset, np.arange(10), {}), 8)
    extras = {name: Extra(tensor.numpy(), per="tokens") for name, tensor in whole.items()}
    tokens = count(dataset, np.arange(10)).tokens
    objective = Distill(0.5, TEMPERATURE, None)
    parts = [pack(dataset, np.arange(10)[i : i + 3], extras) for i in (0, 3, 6, 9)]
    big = gradient(tiny_model(1), objective, [pack(dataset, np.arange(10), extras)], tokens)
    torch.testing.assert_close(gradient(tiny_model(1), objective, parts, tokens), big)


# The teacher


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["小明有12个苹果。", "Tom has 3 apples."] * 3, 280), directory)
    return directory


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Path) -> EncodedDataset:
    fingerprint = ChatTokenizer.load(tokenizer).fingerprint
    return write_rows(tmp_path / "data", random_rows(40), tokenizer=fingerprint)


def save_teacher(directory: Path, tokenizer: Path, seed: int = 2, **changes: int) -> Path:
    vocab_size = ChatTokenizer.load(tokenizer).vocab_size
    model = tiny_model(seed, vocab_size=vocab_size, **changes)
    for parameter in model.parameters():
        parameter.data *= 25 if parameter.dim() > 1 else 1  # some opinions, unlike a new model
    save_checkpoint(directory, model, tokenizer)
    return directory


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


FOREIGN = {
    "untied Llama": LlamaConfig(**SMALL),
    "Llama with biases, which ours has not": LlamaConfig(**SMALL, attention_bias=True),
    "Qwen with more logits than tokens": Qwen2Config(**SMALL),
    "Qwen with a window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_architecture_teaches_through_transformers_where_ours_is_another(
    tmp_path: Path, tokenizer: Path, dataset: EncodedDataset, kind: str
) -> None:
    vocab_size = ChatTokenizer.load(tokenizer).vocab_size
    torch.manual_seed(0)
    config = copy.deepcopy(FOREIGN[kind])
    config.vocab_size = vocab_size + 8 * ("Qwen" in kind)
    stock = AutoModelForCausalLM.from_config(config)
    stock.save_pretrained(tmp_path / "teacher")
    shutil.copy(tokenizer / "tokenizer.json", tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", dataset, "float32")
    assert isinstance(teacher.model, PaddedModel) == ("with a window" in kind or "biases" in kind)
    batch = pack(dataset, np.arange(4), {})
    with torch.no_grad():
        samples = [stock(torch.from_numpy(dataset.row(r)[0].astype(int))[None]) for r in range(4)]
        expected = torch.cat([sample.logits[0] for sample in samples])[batch.predict_at]
    found = teacher(batch.tokens, batch.predict_at).logits
    torch.testing.assert_close(found, expected[:, :vocab_size])


@pytest.mark.parametrize("num_experts", [0, 2])
def test_our_own_checkpoint_teaches_without_transformers(
    tmp_path: Path, tokenizer: Path, dataset: EncodedDataset, num_experts: int
) -> None:
    directory = save_teacher(tmp_path / "teacher", tokenizer, num_experts=num_experts)
    teacher = load_teacher(directory, dataset, "float32")
    assert not isinstance(teacher.model, PaddedModel)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_with_fewer_logits_than_tokens_is_refused(dataset: EncodedDataset) -> None:
    batch = pack(dataset, np.arange(2), {})
    with pytest.raises(UserError, match=f"knows {VOCAB_SIZE} tokens, its tokenizer 280"):
        Teacher(tiny_model(), 280, "float32")(batch.tokens, batch.predict_at)


# The stages

FIT = {
    "seed": 1,
    "epochs": 1.0,
    "max_steps": 0,
    "batch_size": 4,
    "accumulation_steps": 2,
    "optimizer": "adamw",
    "lr": 1e-2,
    "weight_decay": 0.0,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "schedule": "constant",
    "warmup_steps": 0,
    "dtype": "float32",
    "validation_share": 0.2,
    "eval_interval": 2,
    "patience": 0,
    "min_delta": 0.0,
    "log_interval": 1,
    "gradient_checkpointing": False,
}
STUDENT = tiny_model().config.model_dump(exclude={"vocab_size"}) | {"num_layers": 1}


class Project:
    """A folder with parameters, a tokenizer, a teacher and encoded data."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder = folder
        shutil.copytree(tokenizer, folder / "models/tokenizer")
        save_teacher(folder / "models/teacher", tokenizer)
        fingerprint = ChatTokenizer.load(tokenizer).fingerprint
        self.dataset = write_rows(folder / "data", random_rows(40), tokenizer=fingerprint)
        self.params = {
            "teacher_outputs": {
                "mode": "cached",
                "temperature": TEMPERATURE,
                "top_k": 16,
                "dtype": "float32",
                "batch_size": 8,
            },
            "distill": FIT
            | {
                "teacher": "models/teacher",
                "data": "data",
                "init": "models/tokenizer",
                "student": STUDENT,
            },
            "distill_loss": {"alpha": 0.3},
            "sft": FIT | {"init": "models/student"},
        }

    def run(self, stage, *arguments: str) -> Result:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))
        return CliRunner().invoke(stage.app, list(arguments))

    def teach(self, output: str = "outputs", teacher: str = "models/teacher") -> Result:
        self.params["distill"] |= {"teacher": teacher}
        paths = ["--encoded", ".", "--output", output, "--metrics", f"{output}.json"]
        return self.run(teacher_outputs, *paths)

    def distill(self, output: str, *flags: str, init: str = "models/tokenizer") -> Result:
        self.params["distill"] |= {"init": init}
        inputs = ["--encoded", "."]
        outputs = ["--output", f"models/{output}", "--metrics", f"{output}.json"]
        rest = ["--teacher-outputs", "outputs", "--history", f"{output}.csv"]
        return self.run(distill, *inputs, *outputs, *rest, *flags)

    def metrics(self, name: str) -> dict[str, float]:
        return next(iter(json.loads((self.folder / f"{name}.json").read_text()).values()))

    def weights(self, name: str) -> bytes:
        return (self.folder / "models" / name / "model.safetensors").read_bytes()


@pytest.fixture
def project(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, tokenizer)


def succeeds(result: Result) -> None:
    assert result.exit_code == 0, result.output


def complains(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = [line for line in result.stderr.splitlines() if not line.endswith("parameters")]
    return line


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_cached_outputs_are_what_the_teacher_says(project: Project) -> None:
    succeeds(project.teach())
    vocab_size = ChatTokenizer.load(Path("models/teacher")).vocab_size
    opened = TeacherOutputs.open(Path("outputs"), project.dataset, vocab_size)
    batch = pack(project.dataset, np.arange(40), dict(opened.extras))
    exact = cached(load_model(Path("models/teacher")), batch, 16)
    assert torch.equal(batch.extras[TEACHER_IDS].long(), exact[TEACHER_IDS])
    torch.testing.assert_close(
        batch.extras[TEACHER_LOGPROBS].float(), exact[TEACHER_LOGPROBS], rtol=2**-11, atol=2**-24
    )
    metrics = project.metrics("outputs")
    assert metrics["tokens"] == batch.counts.tokens
    share = exact[TEACHER_LOGPROBS][:, :16].exp().sum(1).mean()
    assert metrics["top_share"] == pytest.approx(float(share), rel=1e-5)
    assert 0.3 < metrics["top_share"] < 0.99


def test_a_student_comes_nearer_to_its_teacher_than_the_baseline(project: Project) -> None:
    project.params["distill"] |= {"epochs": 4.0}
    project.params["distill_loss"] = {"alpha": 0.1}
    succeeds(project.teach())
    succeeds(project.distill("distill"))
    succeeds(project.distill("baseline", "--baseline"))
    student, baseline = project.metrics("distill"), project.metrics("baseline")
    assert student["kl_to_teacher"] < 0.95 * baseline["kl_to_teacher"]
    assert baseline["val_loss"] == baseline["val_ce"]
    assert student["val_loss"] == pytest.approx(
        0.1 * student["val_ce"] + 0.9 * TEMPERATURE**2 * student["kl_to_teacher"], rel=1e-5
    )
    for name in ("steps", "tokens", "parameters"):
        assert student[name] == baseline[name]
    # Of the same rows: what a byte costs is what a token costs, times a constant.
    assert student["bits_per_byte"] / student["val_ce"] == pytest.approx(
        baseline["bits_per_byte"] / baseline["val_ce"], rel=1e-4
    )
    header = Path("baseline.csv").read_text().splitlines()[0].split(",")
    assert {"step", "loss", "ce", "val_loss", "val_ce", "val_kl"} <= set(header)
    assert "kl" not in header


def test_the_baseline_is_plain_fine_tuning_of_the_same_student(project: Project) -> None:
    vocab_size = ChatTokenizer.load(Path("models/tokenizer")).vocab_size
    new = tiny_model(FIT["seed"], vocab_size=vocab_size, **STUDENT)
    save_checkpoint(Path("models/student"), new, Path("models/tokenizer"))
    paths = ["--conversations", "data", "--output", "models/sft"]
    succeeds(project.run(sft, *paths, "--metrics", "sft.json", "--history", "sft.csv"))
    succeeds(project.teach())
    succeeds(project.distill("fresh", "--baseline"))
    succeeds(project.distill("from_checkpoint", "--baseline", init="models/student"))
    assert project.weights("fresh") == project.weights("sft")
    assert project.weights("from_checkpoint") == project.weights("sft")


def test_online_and_cached_students_agree(project: Project) -> None:
    project.params["teacher_outputs"] |= {"top_k": 10_000}
    succeeds(project.teach())
    succeeds(project.distill("cached"))
    project.params["teacher_outputs"] |= {"mode": "online"}
    succeeds(project.teach())
    assert [file.name for file in Path("outputs").iterdir()] == ["meta.json"]
    succeeds(project.distill("online"))
    cached_metrics, online_metrics = project.metrics("cached"), project.metrics("online")
    assert cached_metrics.keys() == online_metrics.keys()
    for name, value in cached_metrics.items():  # apart by the rounding of cached log-probabilities
        assert online_metrics[name] == pytest.approx(value, rel=2e-4), name


@pytest.mark.parametrize("damage", ["", "torn", "zeros"])
def test_teacher_outputs_go_on_where_they_were_stopped(
    project: Project, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    succeeds(project.teach("whole"))
    original, calls = Teacher.forward, []

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Teacher, "forward", interrupted)
    stopped = project.teach("outputs")
    assert stopped.exit_code == 128 + signal.SIGTERM
    assert "after 24 of 40 samples" in stopped.stderr
    assert not Path("outputs").exists()
    for file in Path(".resume").rglob("*.bin"):
        if damage == "torn":  # as if killed after more had been written than the checkpoint knows
            with file.open("ab") as stream:
                stream.write(b"torn")
        elif damage == "zeros":  # as a disk does that has lost power
            file.write_bytes(bytes(file.stat().st_size))
    succeeds(project.teach("outputs"))
    assert len(calls) == (3 + 5 if damage == "zeros" else 5)
    assert files(Path("outputs")) == files(Path("whole"))
    assert Path("outputs.json").read_bytes() == Path("whole.json").read_bytes()


def test_teacher_outputs_lost_from_the_resume_folder_are_computed_again(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "")
    succeeds(project.teach("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(teacher_outputs, "write_metrics", lambda *_: 1 / 0)  # dies while saving
        assert isinstance(project.teach("outputs").exception, ZeroDivisionError)
    assert list(Path(".resume").rglob("checkpoint-*"))
    for array in Path(".resume").rglob("*.bin"):
        array.unlink()
    succeeds(project.teach("outputs"))
    assert files(Path("outputs")) == files(Path("whole"))


@pytest.mark.parametrize("cause", ["tokenizer", "no model", "broken config", "broken weights"])
def test_an_unfit_teacher_is_one_line(project: Project, tmp_path: Path, cause: str) -> None:
    teacher = Path("models/teacher")
    if cause == "tokenizer":
        save_tokenizer(train_tokenizer(["another text"], 270), tmp_path / "other")
        shutil.copy(tmp_path / "other/tokenizer.json", teacher / "tokenizer.json")
    elif cause == "no model":
        (teacher / "config.json").unlink()
    elif cause == "broken config":
        (teacher / "config.json").write_text("[]")
    else:
        config = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        (teacher / "model.safetensors").write_bytes(b"broken")
    line = complains(project.teach())
    assert "models/teacher" in line
    assert ("another tokenizer" in line) == (cause == "tokenizer")
    assert not Path("outputs").exists()


@pytest.mark.parametrize("cause", ["missing", "damaged", "cut short", "other data"])
def test_unfit_teacher_outputs_are_one_line(project: Project, cause: str) -> None:
    if cause != "missing":
        succeeds(project.teach())
    if cause == "damaged":
        Path("outputs/meta.json").write_text("{}")
    elif cause == "cut short":
        Path("outputs/logprobs.bin").write_bytes(b"")
    elif cause == "other data":
        write_rows(Path("data"), random_rows(41), tokenizer=project.dataset.tokenizer)
    assert "outputs" in complains(project.distill("distill"))


def test_a_checkpoint_of_another_shape_is_no_start(project: Project) -> None:
    succeeds(project.teach())
    line = complains(project.distill("distill", init="models/teacher"))
    assert "distill.student.num_layers is 1, but models/teacher has 2; make them agree" in line
