"""Adapters: that stock peft understands them, and that merging changes nothing but the form."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from minimind.chat.tokenizer import ChatTokenizer
from minimind.chat.tokenizer_training import save_tokenizer, train_tokenizer
from minimind.datasets.batches import pack
from minimind.errors import UserError
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.lora import AdapterShape, add_adapter, merge_adapter, save_adapter
from minimind.objectives.next_token import NextToken
from stages import lora, merge
from tests.tiny import random_rows, tiny_model, write_rows

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = AdapterShape(rank=4, alpha=8.0, dropout=0.0, projections=ALL)  # type: ignore[arg-type]
CONFIG = {
    "init": "base",
    "data": "data",
    **SHAPE.model_dump(),
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["小明有12个苹果。", "Tom has 3 apples."] * 3, 280), directory)
    return directory


@pytest.fixture
def project(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a base model, encoded data and parameters."""
    monkeypatch.chdir(tmp_path)
    vocab = ChatTokenizer.load(tokenizer)
    save_checkpoint(Path("base"), tiny_model(vocab_size=vocab.vocab_size), tokenizer)
    write_rows(Path("data"), random_rows(40), tokenizer=vocab.fingerprint)
    return tmp_path


def train(output: str = "adapter", **changes: object) -> Result:
    Path("params.yaml").write_text(yaml.safe_dump({"lora": CONFIG | changes}))
    inputs = ["--encoded", "."]
    outputs = ["--output", output, "--metrics", f"{output}.json", "--history", f"{output}.csv"]
    return CliRunner().invoke(lora.app, inputs + outputs)


def trained(output: str = "adapter", **changes: object) -> Path:
    result = train(output, **changes)
    assert result.exit_code == 0, result.output
    return Path(output)


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of the rows of the data set, end to end, by our model or by a stock one."""
    dataset = write_rows(Path("rows"), random_rows(4))
    batch = pack(dataset, np.arange(4), {})
    with torch.no_grad():
        if hasattr(model, "prepare_inputs_for_generation"):
            rows = [torch.from_numpy(dataset.row(r)[0].astype(int)) for r in range(4)]
            return torch.cat([model.eval()(input_ids=row[None]).logits[0] for row in rows])
        return model.eval()(batch.tokens, torch.arange(len(batch.tokens.ids))).logits


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_untrained_adapter_changes_nothing(project: Path, dropout: float) -> None:
    base = load_model(Path("base"))
    before = logits(base)
    model = add_adapter(base, SHAPE.model_copy(update={"dropout": dropout}), seed=1)
    assert torch.equal(logits(model), before)
    save_adapter(Path("adapter"), model)
    merged = merge_adapter(load_model(Path("base")), Path("adapter"))
    assert torch.equal(logits(merged), before)


def test_an_adapter_is_trained_by_either_optimizer(project: Path) -> None:
    """All that it trains are matrices inside layers: Muon leaves none to AdamW."""
    start = json.loads(trained("adamw", optimizer="adamw").with_suffix(".json").read_text())
    muon = json.loads(trained("muon", optimizer="muon").with_suffix(".json").read_text())
    assert muon["lora"]["val_loss"] < muon["lora"]["initial_val_loss"]
    assert files(Path("muon")) != files(Path("adamw"))
    assert muon["lora"]["steps"] == start["lora"]["steps"]


def test_only_the_adapter_learns(project: Path) -> None:
    model = add_adapter(load_model(Path("base")), SHAPE, seed=1)
    batch = pack(write_rows(Path("rows"), random_rows(4)), np.arange(4), {})
    NextToken()(model, batch, 0.0).terms["next_token"].total.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(learning) == 2 * len(ALL) * 2  # two matrices a projection, two layers


def test_stock_peft_loads_the_adapter_on_the_stock_model(project: Path) -> None:
    adapter = trained()
    assert json.loads(Path("adapter.json").read_text())["lora"]["bits_per_byte"] > 0
    stock = AutoModelForCausalLM.from_pretrained("base")
    before = logits(stock)
    adapted = logits(PeftModel.from_pretrained(stock, adapter))
    assert (adapted - before).abs().max() > 1e-2
    merged = merge_adapter(load_model(Path("base")), adapter)
    torch.testing.assert_close(logits(merged), adapted)


def test_an_adapter_of_a_mixture_is_on_attention_alone(project: Path, tokenizer: Path) -> None:
    base = tiny_model(vocab_size=ChatTokenizer.load(tokenizer).vocab_size, num_experts=4)
    save_checkpoint(Path("base"), base, tokenizer)
    refused = train()
    assert refused.exit_code == 1
    assert "down_proj, gate_proj, up_proj" in refused.stderr.splitlines()[-1]
    adapter = trained(projections=["q_proj", "o_proj"])
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter)
    merged = merge_adapter(load_model(Path("base")), adapter)
    torch.testing.assert_close(logits(merged), logits(stock))
    assert (logits(merged) - logits(base)).abs().max() > 1e-2


def test_the_export_is_the_adapted_model(project: Path) -> None:
    adapter = trained()
    arguments = ["--adapter", str(adapter), "--output", "exports/lora"]
    assert CliRunner().invoke(merge.app, arguments).exit_code == 0
    assert CliRunner().invoke(merge.app, [*arguments[:-1], "exports/again"]).exit_code == 0
    assert files(Path("exports/lora")) == files(Path("exports/again"))
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter)
    torch.testing.assert_close(logits(load_model(Path("exports/lora"))), logits(stock))
    exported = AutoModelForCausalLM.from_pretrained("exports/lora")
    torch.testing.assert_close(logits(exported), logits(stock))


def test_an_adapter_of_stock_peft_merges_into_our_model(project: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["v_proj", "up_proj"], task_type="CAUSAL_LM")
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config)
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    stock.save_pretrained("adapter")
    merged = merge_adapter(load_model(Path("base")), Path("adapter"))
    torch.testing.assert_close(logits(merged), logits(stock))


def test_the_same_adapter_is_the_same_bytes_and_names_no_place(project: Path) -> None:
    first = files(trained("first"))
    assert first == files(trained("second"))
    assert Path("first.json").read_bytes() == Path("second.json").read_bytes()
    assert set(first) == {"adapter_config.json", "adapter_model.safetensors"}
    text = first["adapter_config.json"].decode()
    assert str(project) not in text
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == sorted(ALL)  # peft holds a set, whose order varies
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8.0, "CAUSAL_LM")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_stopped_adapter_goes_on_to_the_same_bytes(
    project: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    whole = files(trained("whole", dropout=dropout))
    original, calls = NextToken.__call__, []

    def interrupted(self, *arguments, **named):
        calls.append(None)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments, **named)

    monkeypatch.setattr(NextToken, "__call__", interrupted)
    assert train(dropout=dropout).exit_code == 128 + signal.SIGTERM
    assert not Path("adapter").exists()
    assert files(trained(dropout=dropout)) == whole
    assert Path("adapter.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.parametrize("cause", ["missing", "config", "weights", "other base", "no such modules"])
def test_an_unfit_adapter_is_one_line(project: Path, cause: str) -> None:
    adapter, base = Path("adapter"), load_model(Path("base"))
    save_adapter(adapter, add_adapter(load_model(Path("base")), SHAPE, seed=1))
    if cause == "missing":
        shutil.rmtree(adapter)
    elif cause == "config":
        (adapter / "adapter_config.json").write_text("{")
    elif cause == "weights":
        content = (adapter / "adapter_model.safetensors").read_bytes()
        (adapter / "adapter_model.safetensors").write_bytes(content[:-10])
    elif cause == "other base":
        base = tiny_model(num_layers=3)
    else:
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["target_modules"] = ["query_key_value"]
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="adapter"):
        merge_adapter(base, adapter)


@pytest.mark.parametrize(
    ("key", "value"), [("projections", ["w_q"]), ("projections", []), ("rank", 0), ("dropout", 1.0)]
)
def test_a_wrong_parameter_is_one_line(project: Path, key: str, value: object) -> None:
    result = train(**{key: value})
    assert result.exit_code == 1
    assert f"lora.{key}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "extra",
    [{"modules_to_save": ["embed_tokens"]}, {"lora_bias": True}, {"target_parameters": ["x"]}],
)
def test_an_adapter_with_more_than_low_rank_matrices_is_refused_by_name(
    project: Path, extra: dict[str, object]
) -> None:
    adapter = trained()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | extra))
    (key,) = extra
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is .*; only low-rank"):
        merge_adapter(load_model(Path("base")), adapter)
