"""Which of the project's own code decides a stage's result, as digests that DVC can follow.

DVC hashes bytes and follows no imports. So the stage `code` writes, for each module in `stages/`,
which modules it imports, however far, and a digest of what each says: its syntax tree without
comments, docstrings and layout. Every other stage depends on its file, `code/<stage>.json`.

- Imports inside functions belong to it, and those by importlib: a name with a constant beginning
  (``import_module(f"minimind.tasks.{name}")``) stands for all modules that begin so.
- A file beside a module, whose name stands in the module's code, belongs to it with its bytes.
- The same code gives the same digest on every Python (`ast.dump` does not).
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec, resolve_name
from itertools import accumulate
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.files import replacing

TOP_PACKAGES = ("minimind", "stages")
# Decides how a result is computed, never what it is: devices, processes, signals, records. Imports
# are followed through it, but it is in no digest...
HOW = ("minimind.compute", "minimind.lineage", "minimind.terminal", "minimind.training.run")
# ... apart from what stands there and changes values.
VALUES = ("minimind.compute.matmuls", "minimind.compute.precision")
# Names of the library that are loaded when they are asked for: in no closure, or each would be the
# whole library. And what the stages do before anything is imported.
ENTRANCES = ("minimind", "stages")
# Of a syntax node: said by its place, or by comments.
_SILENT_FIELDS = ("ctx", "kind", "type_comment", "type_ignores")
_DYNAMIC = ("import_module", "__import__")


def code_of(stage: str) -> dict[str, str]:
    """Digests of what decides the result of ``stages/<stage>.py``, by name of module or file.

    Raises:
        UserError: a module cannot be parsed, or an import not be followed.
    """
    digests: dict[str, str] = {}
    for module, path in modules_of(stage).items():
        digests[module] = digest_of(_parsed(path))
        folder = module.rpartition(".")[0].replace(".", "/")
        digests |= {f"{folder}/{file.name}": _hash(file.read_bytes()) for file in _named(path)}
    return dict(sorted(digests.items()))


def modules_of(stage: str) -> dict[str, Path]:
    """The files of those modules that decide the result of ``stages/<stage>.py``, by name."""
    return {
        name: path
        for name in closure(f"stages.{stage}")
        if name in VALUES or not (_decides_how(name) or name in ENTRANCES)
        if (path := _path_of(name))
    }


def closure(module: str) -> list[str]:
    """A module and all of the project that it imports, however far, in alphabetical order."""
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += () if name in ENTRANCES else imports_of(name)
    return sorted(reached)


def write_code(folder: Path, stages: Iterable[str]) -> None:
    """``<folder>/<stage>.json`` for each stage; nothing is written if one cannot be followed."""
    texts = code_texts(stages)
    with replacing(folder) as partial:
        partial.mkdir()
        for stage, text in texts.items():
            (partial / f"{stage}.json").write_text(text, encoding="utf-8")


def code_texts(stages: Iterable[str]) -> dict[str, str]:
    """What :func:`write_code` writes, by stage."""
    return {stage: as_text(code_of(stage)) for stage in stages}


def as_text(digests: Mapping[str, str]) -> str:
    return json.dumps(digests, indent=1) + "\n"


def stage_names() -> list[str]:
    """The modules in ``stages/``, but the one that writes their digests."""
    names = {path.stem for path in _folder_of("stages").glob("[!_]*.py")}
    return sorted(names - {"code"})


def source_files() -> list[Path]:
    """Every file that is part of the code: what DVC hashes of the two packages."""
    paths = (path for top in TOP_PACKAGES for path in _folder_of(top).rglob("*"))
    return sorted(path for path in paths if path.is_file() and path.suffix != ".pyc")


@cache
def digest_of(module: ast.Module) -> str:
    """Of a module's code: the same for any comments, docstrings and layout."""
    return _hash(_written(module).encode("ascii"))


@cache
def imports_of(module: str) -> list[str]:
    """Modules of the project that a module imports itself, anywhere in its code."""
    path = _path_of(module)
    assert path is not None, module
    names = (name for node in ast.walk(_parsed(path)) for name in _imported(node, module, path))
    return sorted({loaded for name in names for loaded in _loaded_by(name)})


def _imported(node: ast.AST, module: str, path: Path) -> Iterator[str]:
    """Dotted names that a node imports; those of objects in modules, too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        base = resolve_name("." * node.level + (node.module or ""), package)
        for alias in node.names:
            name = f"{base}.{alias.name}"
            if base in ENTRANCES and _path_of(name) is None:
                raise UserError(
                    f"{path}:{node.lineno}: {alias.name} is imported from {base}, which loads it "
                    "when it is asked for; import it from its own module."
                )
            yield name
    elif isinstance(node, ast.Call) and node.args and _name_of(node.func) in _DYNAMIC:
        start, is_whole = _constant_start(node.args[0])
        if is_whole:
            yield start
        elif start.startswith(tuple(f"{top}." for top in TOP_PACKAGES)):
            yield from (name for name in _all_modules() if name.startswith(start))
        elif not _decides_how(module):
            raise UserError(
                f"{path}:{node.lineno}: which module is imported cannot be told from the code; "
                'begin its name with a constant, as in import_module(f"minimind.tasks.{name}").'
            )


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _constant_start(node: ast.expr) -> tuple[str, bool]:
    """The constant beginning of a text, and whether it is all of it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, True
    if isinstance(node, ast.JoinedStr) and node.values:
        return _constant_start(node.values[0])[0], False
    if isinstance(node, ast.BinOp):
        return _constant_start(node.left)[0], False
    return "", False


def _loaded_by(name: str) -> list[str]:
    """The project's modules that importing a dotted name loads: packages on the way, too."""
    if name.partition(".")[0] not in TOP_PACKAGES:
        return []
    return [start for start in accumulate(name.split("."), "{}.{}".format) if _path_of(start)]


@cache
def _path_of(module: str) -> Path | None:
    top, *parts = module.split(".")
    place = _folder_of(top).joinpath(*parts)
    paths = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in paths if path.is_file()), None) if parts else paths[1]


@cache
def _folder_of(top_package: str) -> Path:
    """Where a package stands, in a clone or installed, editable too; found without importing it."""
    spec = find_spec(top_package)
    assert spec is not None and spec.submodule_search_locations, top_package
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _all_modules() -> list[str]:
    folders = {top: _folder_of(top) for top in TOP_PACKAGES}
    return sorted(
        ".".join([top, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
        for top, folder in folders.items()
        for path in folder.rglob("*.py")
    )


def _decides_how(module: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in HOW)


def _named(path: Path) -> list[Path]:
    """Files beside a module whose names stand in its code."""
    beside = [file for file in path.parent.iterdir() if file.is_file() and file.suffix != ".py"]
    if not beside:
        return []
    texts = {node.value for node in ast.walk(_parsed(path)) if isinstance(node, ast.Constant)}
    return sorted(file for file in beside if file.name in texts)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@cache
def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), path.name)
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"{path}:{getattr(error, 'lineno', 1)}: not Python: {error}; mend it."
        ) from None


def _written(value: Any) -> str:
    """A syntax tree as ASCII text. What is not there is not written: later Pythons have more."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if not isinstance(value, ast.AST):
        return f"{type(value).__name__}:{value!a}"
    fields = {name: getattr(value, name, None) for name in value._fields}
    if isinstance(body := fields.get("body"), list):
        fields["body"] = [node for node in body if not _is_docstring(node)]
    if isinstance(value, ast.JoinedStr):
        fields["values"] = [part for part in value.values if getattr(part, "value", None) != ""]
    written = [
        f"{name}={_written(field)}"
        for name, field in sorted(fields.items())
        if name not in _SILENT_FIELDS
        and (isinstance(value, ast.Constant) or (field is not None and field != []))
    ]
    return f"{type(value).__name__}({','.join(written)})"


def _is_docstring(node: ast.AST) -> bool:
    """Of whatever stands before it: a text of which nothing is made."""
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False
