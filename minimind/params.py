"""Sections of params.yaml as frozen, checked objects.

A section is a pydantic class that stands next to the code it configures. It has no
defaults: what is not in params.yaml does not exist, so what DVC tracks is all there is.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from minimind.errors import UserError, complaint


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors.

    PyYAML reads ``1e-06`` and ``5e-4`` as strings, DVC as floats; pydantic makes floats of both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


S = TypeVar("S", bound=Section)
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what every random generator takes


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: SafeLoader would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} stands there twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return node


def load_section(path: Path, name: str, section: type[S]) -> S:
    """Read the section ``name`` of a params file; dots descend, as in ``encode.sft``.

    Raises:
        UserError: the file or section is missing, a key is unknown or missing, or a value is
            out of range; the message names file, key, value found and what is allowed.
    """
    value: Any = _read(path)
    for depth, part in enumerate(parts := name.split(".")):
        if not isinstance(value, dict) or part not in value:
            where = ".".join(parts[:depth]) or "the file"
            known = ", ".join(map(str, value)) if isinstance(value, dict) else "none"
            raise UserError(f"{path}: {name} is missing; {where} has the sections: {known}.")
        value = value[part]
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {value!r}; it must be a section with keys.")
    try:
        return section.model_validate(value)
    except ValidationError as error:
        problems = [_describe(name, detail, section) for detail in error.errors()]
        raise UserError(f"{path}: {'; '.join(problems)}") from None


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run from the project's root folder.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{where}: not valid YAML: {problem}; correct it.") from None
    except (ValueError, RecursionError) as error:  # the 99th of a month, 20,000 brackets
        raise UserError(f"{path}: not valid YAML: {error}; correct it.") from None


def _describe(name: str, detail: ErrorDetails, section: type[Section]) -> str:
    key = ".".join([name, *map(str, detail["loc"])])
    match detail["type"]:
        case "extra_forbidden":
            allowed = ", ".join(sorted(section.model_fields))
            return f"{key} is not a known key; allowed are {allowed}"
        case "missing":
            return f"{key} is missing; add it"
        case _:
            reason = complaint(detail)
            found = detail["input"]
            return (
                f"{key}: {reason}" if isinstance(found, dict) else f"{key} is {found!r}; {reason}"
            )
