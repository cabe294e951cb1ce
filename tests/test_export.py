"""Exported folders: the same model in bf16, with a card and a receipt that tell what changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from minimind.cli.main import app
from minimind.exports.folder import write_export
from minimind.exports.receipt import Receipt, read_receipt, tensors_digest
from minimind.lineage.dvc_files import md5_of
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.model.lora import AdapterShape, add_adapter, save_adapter
from stages import export
from tests.graph import ROOT
from tests.tiny import TOKENIZER_SIZE, tiny_model, tiny_tokenizer

GRAPH = {
    "code": {"outs": ["code"]},
    "check": {"outs": ["checked.txt"], "meta": {"output": "constant"}},
    "pretrain": {"outs": ["models/pretrain"]},
    "sft": {"outs": ["models/sft"]},
    "export": {"foreach": {"sft": {}}, "do": {"outs": ["exports/${key}"]}},
}
NO_RECEIPT = Receipt(checkpoint="base", checkpoint_md5=None, command="", ancestors=[])
PREDICTION = {"id": "1", "problem": "1", "level": 1, "task": None, "prompt": "1+1?"}
PREDICTION |= {"output": "2", "answer": "2", "correct": True, "choice_correct": None}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which models/sft was made from models/pretrain and mine.jsonl."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    for seed, name in enumerate(("pretrain", "sft")):
        model = tiny_model(seed, vocab_size=TOKENIZER_SIZE)
        save_checkpoint(Path("models", name), model, tokenizer)
    Path("mine.jsonl").write_text("{}\n")
    for folder in ("metrics", "predictions"):
        Path(folder).mkdir()
    Path("metrics/sft.json").write_text(json.dumps({"sft": {"exact_l1": 1.0}}))
    Path("predictions/sft.jsonl").write_text(json.dumps(PREDICTION) + "\n")
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": GRAPH}))
    write_lock()
    return tmp_path


def write_lock(**changed: str) -> None:
    """changed: hashes that are others in the entry of stage sft."""

    def entry(name: str, deps: list[str], outs: list[str]) -> dict[str, object]:
        hashed = [{"path": p, "md5": changed.get(p, md5_of(Path(p)) or "0" * 32)} for p in deps]
        made = [{"path": path, "md5": md5_of(Path(path)) or "0" * 32} for path in outs]
        params = {"params.yaml": {name: {"lr": 1e-06}}}
        return {"cmd": f"run {name}", "deps": hashed, "outs": made, "params": params}

    stages = {
        "code": entry("code", ["minimind"], ["code"]),
        "check": entry("check", ["code/check.json"], ["checked.txt"]),
        "pretrain": entry("pretrain", ["code/pretrain.json", "checked.txt"], ["models/pretrain"]),
        "sft": entry("sft", ["code/sft.json", "models/pretrain", "mine.jsonl"], ["models/sft"]),
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": stages}))


def exported(checkpoint: str = "models/sft", output: str = "exports/sft") -> Path:
    result = run(checkpoint, output)
    assert result.exit_code == 0, result.output
    return Path(output)


def run(checkpoint: str = "models/sft", output: str = "exports/sft") -> Result:
    paths = ["--checkpoint", checkpoint, "--output", output]
    return CliRunner().invoke(export.app, [*paths, "--evaluation", "metrics/sft.json"])


def verify(folder: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", str(folder)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_an_export_is_the_model_in_bf16_and_loads_anywhere(project: Path, tmp_path: Path) -> None:
    exported()
    far = Path(shutil.move("exports/sft", tmp_path / "far"))
    expected = {n: t.bfloat16() for n, t in load_file("models/sft/model.safetensors").items()}
    found = load_file(far / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    stock = AutoModelForCausalLM.from_pretrained(far)
    assert stock.dtype == torch.bfloat16
    ids = torch.arange(3, 40)[None]
    ours = load_model(far).eval()
    with torch.no_grad():
        theirs = stock.float()(ids).logits[0]
        own = ours.model.embed_tokens.weight
        assert torch.equal(stock.model.embed_tokens.weight, own)
        assert theirs.shape[-1] == TOKENIZER_SIZE
    assert len(AutoTokenizer.from_pretrained(far)) == TOKENIZER_SIZE


def test_large_weights_are_in_several_files_that_hold_the_same_tensors(project: Path) -> None:
    write_export(Path("one"), Path("models/sft"), NO_RECEIPT)
    write_export(Path("many"), Path("models/sft"), NO_RECEIPT, largest_file="20KB")
    parts = sorted(Path("many").glob("*.safetensors"))
    assert len(parts) > 2
    assert all(file.stat().st_size < 30_000 for file in parts)
    one, many = load_model("one").state_dict(), load_model("many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    stock = AutoModelForCausalLM.from_pretrained("many").state_dict()
    assert torch.equal(stock["model.norm.weight"].float(), one["model.norm.weight"])
    assert tensors_digest(Path("one")) == tensors_digest(Path("many"))
    assert verify(Path("many"))[0] == 0


def test_the_receipt_has_every_ancestor_and_nothing_of_the_machine(project: Path) -> None:
    folder = exported()
    receipt = read_receipt(folder)
    assert [ancestor.stage for ancestor in receipt.ancestors] == ["pretrain", "sft"]
    pretrain, sft = receipt.ancestors
    assert pretrain.deps.keys() == {"code/pretrain.json"}  # what `check` reads concerns nobody
    assert sft.deps["models/pretrain"] == pretrain.outs["models/pretrain"]
    assert sft.params == {"params.yaml": {"sft": {"lr": 1e-06}}}
    assert receipt.sources() == {"mine.jsonl": md5_of(Path("mine.jsonl"))}
    assert receipt.command == "dvc repro export@sft"
    assert {*receipt.files} == {*files(folder)} - {"lineage.json"}
    assert (
        str(project)
        not in (folder / "lineage.json").read_text() + (folder / "README.md").read_text()
    )
    before = files(folder)
    assert files(exported()) == before


def test_the_card_says_what_there_is_to_know(project: Path) -> None:
    text = (exported() / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "other"  # mine.jsonl is not the project's
    for part in ("100 21–100", "1+1?", "mine.jsonl", "dvc repro export@sft", "LlamaForCausalLM"):
        assert part in text, part
    Path("dvc.lock").unlink()
    receipt = read_receipt(exported())
    assert receipt.sources() == {"models/sft": md5_of(Path("models/sft"))}


def test_a_copy_of_our_own_synonyms_has_no_license_of_others(project: Path) -> None:
    shutil.copyfile(ROOT / "minimind/datasets/synonyms.json", "synonyms.json")
    for edited in (False, True):
        with Path("synonyms.json").open("a") as file:
            file.write(" " * edited)
        write_lock()
        lock = yaml.safe_load(Path("dvc.lock").read_text())
        mine = {"path": "synonyms.json", "md5": md5_of(Path("synonyms.json"))}
        lock["stages"]["sft"]["deps"][-1] = mine
        Path("dvc.lock").write_text(yaml.safe_dump(lock))
        text = (exported() / "README.md").read_text(encoding="utf-8")
        assert ("license: other" in text) == edited


def test_a_lock_that_does_not_fit_the_checkpoint_gives_no_receipt(project: Path) -> None:
    write_lock(**{"models/pretrain": "1" * 32})
    result = run()
    assert result.exit_code == 1
    assert "how models/pretrain was made" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("exports").exists()


def flip_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_receipt(**values: object) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "lineage.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return changed


def another_parent(folder: Path) -> None:
    contents = json.loads((folder / "lineage.json").read_text())
    contents["ancestors"][1]["deps"]["models/pretrain"] = "0" * 32
    change_receipt(**contents)(folder)


BREAKS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a weight": (flip_a_weight, ["files: BROKEN: model.safetensors", "tensors: BROKEN"]),
    "a file": (
        lambda f: (f / "config.json").write_text("{}"),
        ["files: BROKEN: config.json has"],
    ),
    "a file less": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json is missing"]),
    "a file more": (lambda f: (f / "run.py").write_text(""), ["run.py is not in the receipt"]),
    "no weights": (lambda f: (f / "model.safetensors").write_bytes(b"x"), ["cannot be read"]),
    "a parent": (another_parent, ["lineage: BROKEN: stage sft read another models/pretrain"]),
    "another checkpoint": (
        change_receipt(checkpoint_md5="0" * 32),
        ["lineage: BROKEN: it was made from another models/sft"],
    ),
    "no receipt": (lambda f: (f / "lineage.json").unlink(), ["lineage.json is missing"]),
    "half a receipt": (lambda f: (f / "lineage.json").write_text("{"), ["lineage.json: "]),
    "a list": (lambda f: (f / "lineage.json").write_text("[]"), ["lineage.json: it should be"]),
    "a key more": (change_receipt(audited="yes"), ["lineage.json: audited: Extra inputs are not"]),
    "a path": (change_receipt(files={"../x": "0"}), ["lineage.json: files: ../x: "]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_verify_finds_what_is_not_as_the_receipt_says(
    project: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.move(exported(), tmp_path / "far"))
    for file in (project / "dvc.yaml", project / "dvc.lock"):
        file.unlink()
    code, said = verify(folder)
    assert code == 0, said
    assert "models/sft, by 2 stages from mine.jsonl" in said
    for beside in ("it.Modelfile", ".gitattributes"):
        (folder / beside).write_text("")
    assert verify(folder)[0] == 0
    break_it, words = BREAKS[name]
    break_it(folder)
    code, said = verify(folder)
    assert code == 1
    assert all(word in said for word in words), said


def test_an_adapter_is_loaded_with_its_base(project: Path) -> None:
    base = Path("models/pretrain")
    model = add_adapter(load_model(base), AdapterShape(rank=2), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(Path("models/lora"), model)
    refused = run("models/lora", "exports/lora")
    assert refused.exit_code == 1
    assert "base_model_name_or_path" in refused.stderr
    Path("models/lora/adapter_config.json").write_text("[]")
    assert "is not of an adapter" in run("models/lora", "exports/lora").stderr
    save_adapter(Path("models/lora"), model, base)
    folder = exported("models/lora", "exports/lora")
    ids = torch.arange(3, 40)[None]
    stock = AutoPeftModelForCausalLM.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        adapted, before = stock(input_ids=ids).logits, plain(input_ids=ids).logits
    assert (adapted - before).abs().max() > 0.1
    assert "adapter of rank 2 for models/pretrain" in (folder / "README.md").read_text()
    assert verify(folder)[0] == 0
