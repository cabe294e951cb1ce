"""Paths in params.yaml that lead nowhere.

DVC only says `[Errno 2] No such file or directory`, after it has removed the stage's outputs, and
does not name the parameter. At a pipe it waits for ever.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from minimind.errors import UserError
from minimind.lineage.dvc_files import output_paths, value_at, variants

_PARAMETER = re.compile(r"\$\{(?!(?:item|key)\b)([\w.]+)\}")


def quoted(word: str) -> str:
    """A word of a command for people to run, as sh, zsh and fish take it."""
    # Fish knows backslashes inside single quotes too: they stand in double quotes, in all three.
    return shlex.quote(word).replace("\\", """'"\\\\"'""")


def path_templates(stages: Mapping[str, Any]) -> list[str]:
    """The dependencies in dvc.yaml that a parameter stands in: `data/encoded/${lora.data}`."""
    texts: list[str] = []
    for stage in stages.values():
        texts += stage.get("do", stage).get("deps", [])
        of_variants = stage.get("foreach", {})
        for variant in of_variants.values() if isinstance(of_variants, dict) else ():
            texts += variant.values() if isinstance(variant, dict) else [variant]
    return [text for text in dict.fromkeys(texts) if _PARAMETER.search(text)]


def keys_of(template: str) -> list[str]:
    """The parameters in a dependency."""
    return [str(key) for key in _PARAMETER.findall(template)]


def unreadable(path: Path) -> str | None:
    """Why there is no file or folder to read: a pipe would be waited for."""
    if path.is_file() or path.is_dir():
        return None
    if path.is_symlink():
        return f"a link to {os.readlink(path)}, which is missing"
    return "a pipe, socket or device, no file" if path.exists() else "missing"


def refuse_lost(params: Any, stages: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for paths that lead nowhere and for checkpoints that are not evaluated.

    params: what stands in `file`; stages: as dvc.yaml has them.
    """
    if wrong := [*lost_paths(stages, params), *unknown_checkpoints(stages, params)]:
        raise UserError(f"{file}: {' '.join(wrong)}")


def lost_paths(stages: Mapping[str, Any], params: Any) -> Iterator[str]:
    """What is to be said of each path that does not exist and that no stage makes."""
    made = [p for _, stage, key in variants(stages) for p in output_paths(stage.get("outs"), key)]
    for template in path_templates(stages):
        path = _PARAMETER.sub(lambda match: str(value_at(params, match[1])), template)
        key = keys_of(template)[0]
        value = value_at(params, key)
        if Path.cwd().is_relative_to(os.path.abspath(path)):
            yield f"{key} is {value!r}, a folder that this project is in; name a folder of its own."
        elif _is_brought(path, made):
            continue
        elif odd := _odd_file(Path(path)):
            yield f"{key} is {value!r}, but {odd}, which DVC cannot read; remove it."
        elif not Path(path).exists():
            what = "a path" if path == value else f"for {path}, a path"
            yield (
                f"{key} is {value!r}, {what} that does not exist and that no stage makes; "
                f"{_advice(key, path, template, made)}"
            )


def unknown_checkpoints(stages: Mapping[str, Any], params: Any) -> Iterator[str]:
    """What is to be said of names in `evaluate.text_checkpoints` that no checkpoint has."""
    evaluated = stages.get("evaluate", {}).get("foreach")
    made = [p for _, stage, key in variants(stages) for p in output_paths(stage.get("outs"), key)]
    known = {*(evaluated or ()), *(p.removeprefix("models/") for p in made if "models/" in p)}
    for name in value_at(params, "evaluate.text_checkpoints") or () if evaluated else ():
        if name not in known:
            yield (
                f"evaluate.text_checkpoints has {name!r}, which is no checkpoint; allowed are "
                f"{', '.join(evaluated)}."
            )


def refuse_pipes(stages: Iterable[Any]) -> None:
    """Raises UserError for a pipe among what DVC's stages read and write: it would be waited for.

    Stage check finds it too, but runs only when params.yaml has changed. A link to nothing is
    nothing to DVC.
    """
    paths = {item.fs_path for stage in stages for item in (*stage.deps, *stage.outs)}
    for place in (place for path in sorted(paths) for place in _places(Path(path))):
        if place.exists() and (why := unreadable(place)):
            raise UserError(f"{os.path.relpath(place)} is {why}, which DVC cannot read; remove it.")


def _odd_file(path: Path) -> str | None:
    """What is no file there, or in that folder."""
    for place in _places(path):
        if os.path.lexists(place) and (why := unreadable(place)):
            return f"{place} is {why}"
    return None


def _places(path: Path) -> list[Path]:
    return [path, *(path.rglob("*") if path.is_dir() else ())]


def _is_brought(path: str, made: list[str]) -> bool:
    """Whether a stage or `dvc pull` makes it, be it here or not.

    A file in a folder that was pulled is there, or is nowhere.
    """
    place = PurePosixPath(os.path.normpath(path))
    tracked = [p for p in (place, *place.parents) if Path(f"{p}.dvc").is_file()]
    return any(p == place or Path(path).exists() or not Path(p).exists() for p in tracked) or any(
        place.is_relative_to(o) or PurePosixPath(o).is_relative_to(place) for o in made
    )


def _advice(key: str, path: str, template: str, made: list[str]) -> str:
    before, after = _PARAMETER.split(template)[::2]
    if before or after:
        fitting = [out for out in made if out.startswith(before) and out.endswith(after)]
        names = [out.removeprefix(before).removesuffix(after) for out in fitting]
        return f"write one of {', '.join(names)}."
    folder = Path(path).parent
    known = sorted(map(str, folder.iterdir())) if folder.is_dir() else []
    if not key.startswith("data."):
        if f"models/{path}" in made:
            return f"write models/{path}."
        known += [out for out in made if out.startswith("models/")]
    if close := get_close_matches(path, known, 1):
        return f"did you mean {close[0]}?"
    return "write the path of something that is there, or that a stage makes."
