"""The receipt of an exported folder, lineage.json: what it was made from, hashes of what it is.

It can be checked far from any repository. What a checkpoint comes of is found in dvc.lock by
hashes: each entry by what another was run with, from the checkpoint itself back to the data.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import safetensors
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import SafetensorError

from minimind.errors import UserError, complaint
from minimind.lineage.dvc_files import maker_of, md5_of, stages_as_written, variants
from minimind.lineage.provenance import CODE
from minimind.lineage.verify import Finding, Project
from minimind.report.ancestry import CONSTANT

RECEIPT = "lineage.json"
GgufType = Literal["f32", "f16", "q8_0"]
# Made from an export, or left by what brought it: no receipt has them.
_BESIDE = (RECEIPT, "*.Modelfile", "*.gguf", ".*")

# A project of `minimind init` has a copy of it.
_SYNONYMS = Path(__file__).parents[1] / "datasets" / "synonyms.json"

_Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]  # of a file in the folder itself


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")  # what nobody checks would look as if it were


class Ancestor(_Strict):
    """A stage's entry of dvc.lock; hashes are DVC's, by path."""

    stage: str
    command: str
    params: dict[str, Any]  # by file and section
    deps: dict[str, str | None]
    outs: dict[str, str | None]


class Receipt(_Strict):
    """What lineage.json holds."""

    checkpoint: str
    checkpoint_md5: str | None  # as DVC hashes a folder
    command: str  # makes it again, in the project
    ancestors: list[Ancestor]  # each after those that it comes of; none if no stage made it
    tensors: str = ""  # SHA-256, however they are spread over files
    files: dict[_Name, str] = Field(default_factory=dict)  # SHA-256 of all others

    def sources(self) -> dict[str, str | None]:
        """MD5 of the data and checkpoints that were read and that no stage made, by path."""
        makers = {path: ancestor.stage for ancestor in self.ancestors for path in ancestor.outs}
        read = {path: md5 for ancestor in self.ancestors for path, md5 in ancestor.deps.items()}
        if not self.ancestors:
            read = {self.checkpoint: self.checkpoint_md5}
        ours = ("code/", "minimind/")
        return {
            path: md5
            for path, md5 in read.items()
            if not path.startswith(ours)
            and maker_of(path, makers) is None
            and md5 != md5_of(_SYNONYMS)
        }


def trace(checkpoint: Path, output: Path, root: Path = Path()) -> Receipt:
    """Of a checkpoint in a project, without the hashes of what is made of it in `output`.

    Raises:
        UserError: dvc.lock does not say how it was made, or its entries do not fit together.
    """
    path = checkpoint.as_posix()
    command = f"python -m stages.export --checkpoint {path} --output {output.as_posix()}"
    expected = {path: md5_of(root / path)}
    ancestors: list[Ancestor] = []
    if (root / "dvc.lock").is_file():
        project = Project(root)
        if stage := project.maker.get(output.as_posix()):
            command = f"dvc repro {stage}"
        ancestors = [*_ancestors(path, project, expected)]
    return Receipt(
        checkpoint=path,
        checkpoint_md5=expected[path],
        command=command,
        ancestors=ancestors[::-1],
    )


def _ancestors(path: str, project: Project, expected: dict[str, str | None]) -> Iterator[Ancestor]:
    """Each before those that it comes of. expected: hashes of what was read, by path."""
    written = variants(stages_as_written(project.root / "dvc.yaml"))
    # Those rerun because of what does not concern their output: it would be told of a former run.
    silent = {name for name, stage, _ in written if stage.get("meta") == CONSTANT}
    maker = maker_of(path, project.maker)
    for name in reversed(project.ancestors(maker) if maker else []):
        if name == CODE.name or name in silent:
            continue
        entry = project.lock.get(name, {})
        outs = {out["path"]: out.get("md5") for out in entry.get("outs", [])}
        for made in {*project.outputs[name]} & {*expected}:
            if outs.get(made) != expected[made]:
                raise UserError(
                    f"dvc.lock does not say how {made} was made as it was read; "
                    f"`dvc repro {name}` makes it anew."
                )
        deps = {
            dep["path"]: dep.get("md5")
            for dep in entry.get("deps", [])
            if maker_of(dep["path"], project.maker) not in silent
        }
        expected |= deps
        yield Ancestor(
            stage=name,
            command=entry["cmd"],
            params=entry.get("params", {}),
            deps=deps,
            outs=outs,
        )


def write_receipt(folder: Path, receipt: Receipt) -> None:
    """Add what is in a folder, and put the receipt beside it."""
    files = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
    whole = receipt.model_copy(update={"tensors": tensors_digest(folder), "files": files})
    (folder / RECEIPT).write_text(whole.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_receipt(folder: Path) -> Receipt:
    """Raises UserError where there is none, or it is not as :func:`write_receipt` writes it."""
    file = folder / RECEIPT
    try:
        return Receipt.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} is missing; take a folder that a stage `export` made.") from None
    except ValidationError as error:
        detail = error.errors()[0]
        where = "".join(f" {key}:" for key in detail["loc"])
        raise UserError(
            f"{file}:{where} {complaint(detail)}; take the folder from its source again."
        ) from None


def check_export(folder: Path) -> Iterator[Finding]:
    """Whether files, tensors and lineage of an exported folder are what its receipt says.

    Raises:
        UserError: there is no receipt.
    """
    receipt = read_receipt(folder)
    here = {
        file.name
        for file in folder.iterdir()
        if file.is_file() and not any(map(file.match, _BESIDE))
    }
    wrong = [f"{name} is missing" for name in receipt.files if not (folder / name).is_file()]
    wrong += [f"{name} is not in the receipt" for name in sorted(here - {*receipt.files})]
    wrong += [
        f"{name} has the SHA-256 {found[:8]}..., but the receipt says {digest[:8]}..."
        for name, digest in receipt.files.items()
        if name in here and (found := sha256_of(folder / name)) != digest
    ]
    yield _finding("files", f"{len(receipt.files)} are as the receipt says", wrong)
    try:
        found = tensors_digest(folder)
        wrong = [] if found == receipt.tensors else ["they are others than the receipt says"]
    except (SafetensorError, OSError) as error:
        wrong = [f"they cannot be read: {error}"]
    yield _finding("tensors", f"as the receipt says, SHA-256 {receipt.tensors}", wrong)
    made: dict[str, str | None] = {}
    wrong = []
    for ancestor in receipt.ancestors:
        wrong += _unlike(made, ancestor.deps, f"stage {ancestor.stage} read")
        made |= ancestor.outs
    wrong += _unlike(made, {receipt.checkpoint: receipt.checkpoint_md5}, "it was made from")
    sources = ", ".join(receipt.sources()) or "the project's own data"
    text = f"{receipt.checkpoint}, by {len(receipt.ancestors)} stages from {sources}"
    yield _finding("lineage", text, wrong)
    yield Finding("receipt", f"SHA-256 {sha256_of(folder / RECEIPT)}", "whole")


def ggufs_of(folder: Path) -> list[Path]:
    """GGUF files in a folder, and those that `minimind gguf` puts beside it by its name."""
    folder = folder.resolve()  # which may be a "."
    beside = [f"{folder.name}-{kind}.gguf" for kind in get_args(GgufType)]
    return sorted(
        [*folder.glob("*.gguf"), *(f for f in folder.parent.iterdir() if f.name in beside)]
    )


def require_whole(folder: Path) -> None:
    """Raises UserError where :func:`check_export` finds something wrong."""
    for finding in check_export(folder):
        if finding.verdict != "whole":
            raise UserError(
                f"{folder} is not what its receipt says: {finding.subject}: {finding.text}; make "
                "it again, or take it from its source again."
            )


def tensors_digest(folder: Path) -> str:
    """SHA-256 of a line for each tensor in *.safetensors: SHA-256 of its bytes, type, shape, name.

    Raises:
        SafetensorError: a file is damaged.
    """
    lines = [
        f"{hashlib.sha256(tensor['data']).hexdigest()} {tensor['dtype']} {tensor['shape']} {name}"
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.deserialize(file.read_bytes())
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _finding(subject: str, text: str, wrong: list[str]) -> Finding:
    return Finding(subject, wrong[0], "broken") if wrong else Finding(subject, text, "whole")


def _unlike(
    made: Mapping[str, str | None], read: Mapping[str, str | None], what: str
) -> Iterator[str]:
    for path, md5 in read.items():
        if made.get(path, md5) != md5:
            yield f"{what} another {path} than its stage made"
