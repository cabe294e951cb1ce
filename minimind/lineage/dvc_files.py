"""DVC's own files: what dvc.yaml and dvc.lock say, and hashes as they stand there."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from minimind.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: DVC's lock is not waited for
    fcntl = None  # type: ignore[assignment]

# Every scalar is a string, as it is written: DVC and PyYAML disagree about what 1e-06 and yes are.
_Loader: Any = type(
    "_Loader",
    (getattr(yaml, "CSafeLoader", yaml.SafeLoader),),  # faster where there is libyaml
    {"yaml_implicit_resolvers": {"<": [("tag:yaml.org,2002:merge", re.compile("<<$"))]}},
)


@contextmanager
def kept_from_dvc(root: Path, seconds: float = 10.0) -> Iterator[None]:
    """While this is open, DVC leaves dvc.lock alone, which it overwrites in place.

    seconds: to wait for DVC, which overwrites in a moment, but may have its lock for hours, as for
    `dvc push`.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # no file: DVC has never run here
            lock = stack.enter_context((root / ".dvc/tmp/lock").open("rb"))
            end = time.monotonic() + seconds
            while fcntl and time.monotonic() < end:
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
        yield


def read_as_written(file: Path) -> Any:
    """YAML whose scalars are strings; raises OSError, or UserError for what is none."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (ValueError, yaml.YAMLError) as error:  # libyaml reads no "\\ud800", as PyYAML does
        raise UserError(f"{file} is not valid YAML: {error}; correct it.") from None


def stages_as_written(file: Path) -> dict[str, Any]:
    """The stages in dvc.yaml or dvc.lock; none where the file cannot be read, as DVC will say."""
    try:
        stages = read_as_written(file)["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return stages if isinstance(stages, dict) else {}


def variants(stages: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, definition and variant of each stage of dvc.yaml."""
    for name, stage in stages.items():
        if "foreach" in stage:
            yield from ((f"{name}@{key}", stage["do"], str(key)) for key in stage["foreach"])
        else:
            yield name, stage, ""


def output_paths(entries: list[str | dict[str, Any]] | None, variant: str) -> list[str]:
    """The paths in a stage's outs or metrics in dvc.yaml."""
    paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries or []]
    return [path.replace("${key}", variant).replace("${item}", variant) for path in paths]


def maker_of(path: str, makers: Mapping[str, str]) -> str | None:
    """The stage that makes a path, or a folder it is in. makers: stages by their outputs."""
    place = PurePosixPath(path)
    return next((m for p in (place, *place.parents) if (m := makers.get(str(p)))), None)


def value_at(tree: Any, key: str) -> Any:
    """What stands below a key whose dots descend, as in `encode.sft`; None if nothing does."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def first_difference(
    key: str, before: Any, now: Any, meaning: Callable[[Any], Any] = lambda value: value
) -> tuple[str, Any, Any] | None:
    """The first value, at a key or below it, that does not mean what it did: its key, and both."""
    return next(differences(key, before, now, meaning), None)


def differences(
    key: str, before: Any, now: Any, meaning: Callable[[Any], Any] = lambda value: value
) -> Iterator[tuple[str, Any, Any]]:
    """All such values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from differences(f"{key}.{name}", before.get(name), now.get(name), meaning)
    elif meaning(before) != meaning(now):
        yield key, before, now


def md5_of(path: Path) -> str | None:
    """DVC's hash of a file or folder; None if it is not there."""
    if path.is_dir():
        return md5_of_listing(listing_of(path))
    return md5_of_file(path) if path.is_file() else None


def md5_of_file(file: Path) -> str:
    with file.open("rb") as content:
        return md5_of_content(content)


def md5_of_content(content: BufferedReader) -> str:
    return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def listing_of(folder: Path) -> dict[str, str]:
    """MD5 of each file below a folder, by its path there; without *.pyc, as in .dvcignore."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(folder).as_posix(): md5_of_file(path) for path in files}


def md5_of_listing(listing: Mapping[str, str]) -> str:
    """MD5 of the list of a folder's files with their MD5s, as DVC makes it."""
    listed = [{"md5": listing[name], "relpath": name} for name in sorted(listing)]
    content = json.dumps(listed, sort_keys=True).encode("utf-8")
    return hashlib.md5(content, usedforsecurity=False).hexdigest() + ".dir"
