"""Data and models from Hugging Face and ModelScope: at a revision, checked, tracked by DVC.

Hugging Face is asked through its own library (HF_ENDPOINT, HF_TOKEN, ... are its variables),
ModelScope over plain HTTP (MODELSCOPE_ENDPOINT). What has come so far stays when a command is
stopped; the same command goes on from there.
"""

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from dvc.utils.serialize import load_yaml
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from minimind.errors import UserError
from minimind.project.share import dvc_project

HubName = Literal["huggingface", "modelscope"]
Kind = Literal["dataset", "model"]
_TOKENS = {"huggingface": " and HF_TOKEN", "modelscope": ""}  # who reads one
# What we read of a model's repository, and what a person wants to know of it.
PARTS_OF_A_MODEL = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "*.md", "LICENSE*")
TIMEOUT_SECONDS = 60.0
PAGE = 100  # files that ModelScope lists at a time


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    path: str
    size: int
    sha256: str | None
    blob: str | None = None  # git's name of a small file, where there is no SHA-256

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has it, with every byte."""
        file = folder / self.path
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        return self.sha256 == sha256_of(file) if self.sha256 else self.blob == _blob_of(file)


@dataclass(frozen=True)
class Repository:
    """What a hub has under a name, at a revision."""

    hub: HubName
    kind: Kind
    name: str
    revision: str
    files: list[HubFile]

    def __str__(self) -> str:
        return f"{self.hub}:{self.kind}s/{self.name}@{self.revision}"

    def chosen(self, patterns: Iterable[str]) -> list[HubFile]:
        """The files that patterns name; without any all of a data set, or what a model is made of.

        Raises:
            UserError: a pattern names none.
        """
        if not (wanted := list(patterns)):
            files = [file for file in self.files if not file.path.startswith(".")]
            if self.kind == "dataset":
                return files
            return [f for f in files if "/" not in f.path and _matches(f, PARTS_OF_A_MODEL)]
        for pattern in wanted:
            if not any(_matches(file, [pattern]) for file in self.files):
                there = ", ".join(file.path for file in self.files[:20])
                raise UserError(f"{self} has no file {pattern}; it has: {there}.")
        return [file for file in self.files if _matches(file, wanted)]


def find(hub: HubName, name: str, revision: str | None, kind: Kind | None) -> Repository:
    """A repository, of either kind where none is said.

    Raises:
        UserError: there is none, there are two, or the hub cannot be asked.
    """
    ask = _ask_huggingface if hub == "huggingface" else _ask_modelscope
    kinds: list[Kind] = [kind] if kind else ["dataset", "model"]
    with _one_line(f"{hub} {name}", f"its name, --rev, the network{_TOKENS[hub]} may be why"):
        found = [there for each in kinds if (there := ask(name, revision, each))]
    if len(found) != 1:
        several = "both a data set and a model: say --kind" if found else "no data set or model"
        raise UserError(f"{name} is {several} of {hub}, at revision {revision or 'by default'}.")
    for file in found[0].files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or "\\" in file.path:
            raise UserError(f"{found[0]} has a file that would lie elsewhere: {file.path!r}.")
    return found[0]


def bring(
    repository: Repository, files: list[HubFile], folder: Path
) -> tuple[list[HubFile], list[str]]:
    """Have files in a folder, and DVC track it; its ``.dvc`` file says where each is from.

    Returns those that were not there already, and the names of others there, of elsewhere or of
    another revision.

    Raises:
        UserError: a file cannot be had or is damaged, the folder is something else's, or this is no
            DVC project.
    """
    with dvc_project() as dvc:
        root = Path(dvc.root_dir).resolve()
        if folder.resolve() == root or not folder.resolve().is_relative_to(root):
            raise UserError(f"{folder} is no folder in the project {root}; name one, as data/mine.")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder, as data/mine.")
        missing = [file for file in files if not file.is_in(folder)]
        _require_ours(folder, files, missing)
        partial = folder.with_name(f"{folder.name}.partial")
        for file in missing:
            with _one_line(f"{repository}: {file.path}", "the same command goes on from here"):
                _download(repository, file, partial)
                if not file.is_in(partial):
                    (partial / file.path).unlink()
                    raise UserError(
                        f"{repository}: {file.path} is not what the hub says it is; get it again."
                    )
        for file in missing:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            (partial / file.path).replace(folder / file.path)
        shutil.rmtree(partial, ignore_errors=True)
        (stage,) = dvc.add(str(folder))
        known = (stage.meta or {}).get("files", {})
        for file in files:
            sha256 = file.sha256 or sha256_of(folder / file.path)
            known[file.path] = {"from": str(repository), "sha256": sha256}
        stage.meta = {"files": known}
        stage.dump()
        others = [name for name, entry in known.items() if entry["from"] != str(repository)]
    return missing, others


def _require_ours(folder: Path, files: list[HubFile], missing: list[HubFile]) -> None:
    """Raises UserError where files would lie among those of others, or take the place of one."""
    tracked, known = folder.with_name(f"{folder.name}.dvc"), {}
    others = {file.path for file in missing}
    if tracked.is_file():
        known = (load_yaml(tracked).get("meta") or {}).get("files", {})
    else:  # the command may have been stopped before DVC had tracked the folder
        there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        others |= there - {file.path for file in files}
    for name in others:
        file = folder / name
        if file.is_file() and known.get(name, {}).get("sha256") != sha256_of(file):
            raise UserError(
                f"{file} is there, and not as a hub has it; move it away, or give another --output."
            )


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _blob_of(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _matches(file: HubFile, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(file.path, pattern) for pattern in patterns)


def _download(repository: Repository, file: HubFile, folder: Path) -> None:
    """Have a file, or the rest of it, of which there may be a part.

    By a function of Hugging Face's library for both hubs: `hf_hub_download` would begin anew.
    """
    if repository.hub == "modelscope":
        query = urlencode({"Revision": repository.revision, "FilePath": file.path})
        place = f"{repository.kind}s/{repository.name}"
        address, headers = f"{_modelscope()}/api/v1/{place}/repo?{query}", {}
    else:
        address = hf_hub_url(
            repository.name,
            file.path,
            repo_type=repository.kind,
            revision=repository.revision,
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
        headers = build_hf_headers()
    (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
    with (folder / file.path).open("ab") as stream:
        if (start := stream.tell()) < file.size:
            http_get(address, stream, resume_size=start, headers=headers, expected_size=file.size)


def _ask_huggingface(name: str, revision: str | None, kind: Kind) -> Repository | None:
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    ask = api.dataset_info if kind == "dataset" else api.model_info
    try:
        info = ask(name, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    files = [
        HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in info.siblings or []
    ]
    return Repository("huggingface", kind, name, str(info.sha), files)


def _modelscope() -> str:
    return os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn").rstrip("/")


def _ask_modelscope(name: str, revision: str | None, kind: Kind) -> Repository | None:
    revision = revision or "master"
    address = f"{_modelscope()}/api/v1/{kind}s/{quote(name)}"
    query = {"Revision": revision, "Recursive": "True"}
    try:
        if kind == "model":
            listed = _json(f"{address}/repo/files?{urlencode(query)}")["Files"]
        else:
            number = _json(address)["Id"]
            listed, page = [], 0
            while len(listed) == PAGE * page:
                page += 1
                query |= {"Root": "/", "PageNumber": str(page), "PageSize": str(PAGE)}
                tree = f"{_modelscope()}/api/v1/datasets/{number}/repo/tree?{urlencode(query)}"
                listed += _json(tree)["Files"] or []
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    files = [
        HubFile(file["Path"], file["Size"], file["Sha256"])
        for file in listed
        if file["Type"] != "tree"
    ]
    return Repository("modelscope", kind, name, revision, files)


def _json(address: str) -> Any:
    with urlopen(Request(address), timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)["Data"]


@contextmanager
def _one_line(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any part of a library, or of what a server says
        said = " ".join(str(error).split()) or repr(error)
        raise UserError(f"{what}: {type(error).__name__}: {said[:300]}; {advice}.") from None
