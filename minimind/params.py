"""Sections of params.yaml as frozen, checked objects.

A section is a pydantic class that stands next to the code it configures. params.yaml lists what
people turn; the rest are defaults of the class, part of the code that DVC tracks, and set by
``-S '++reason.grad_clip=0.5'``. Seed and number format may stand once, at the top, for all
sections that have none; there they must stand.
"""

import math
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from minimind.errors import UserError, complaint

_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors.

    PyYAML reads ``1e-06`` and ``5e-4`` as strings, DVC as floats; pydantic makes floats of both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take ``lr: yes`` for 1.0, and ``lr: "1_000"``, which DVC leaves a text."""
        annotation = info.field_name and cls.model_fields[info.field_name].annotation
        parts = value if isinstance(value, list) else [value]
        if annotation is not bool and any(isinstance(part, bool) for part in parts):
            raise ValueError("it should not be true or false")
        if annotation in (int, float) and isinstance(value, str) and not _NUMBER.fullmatch(value):
            raise ValueError("it should be a number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _is_computed_with(cls, value: Any) -> Any:
        """What float32 has not would end in a traceback, far from here."""
        numbers = value.values() if isinstance(value, dict) else value
        for number in numbers if isinstance(numbers, Iterable) else [value]:
            if isinstance(number, float) and number and not SMALLEST <= abs(number) <= LARGEST:
                raise ValueError(f"it should be 0, or between {SMALLEST:g} and {LARGEST:g} in size")
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError("it should be less than 2^63 in size")
        return value


SMALLEST, LARGEST = 1e-37, 1e38  # numbers of a section: what float32 has
MAX_VALUES = 100_000  # of a params file
S = TypeVar("S", bound=Section)
SHARED = ("seed", "dtype")  # a section that does not set them has them from the top level


def _is_said(value: Any) -> Any:
    if value == "":  # the folder that we are in, to Python
        raise ValueError("it should be a path")
    return value


UserPath = Annotated[Path, BeforeValidator(_is_said)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what every random generator takes


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice, as SafeLoader would silently take the last, and whose
    aliases can be written out: nine levels of nine aliases are a third of a billion values.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > MAX_VALUES:
            problem = f"its aliases stand for more than {MAX_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=problem)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):  # the 99th, `!!int ""`
            problem = f"{node.value!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

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


def _written_out(node: yaml.Node, counted: dict[yaml.Node, float]) -> float:
    """How many values a node holds, aliases written out; one that holds itself has no end."""
    if node not in counted:
        counted[node] = math.inf  # until it is known
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = chain(*inner) if isinstance(node, yaml.MappingNode) else inner
        counted[node] = 1 + sum(_written_out(part, counted) for part in parts)
    return counted[node]


def load_section(path: Path, name: str, section: type[S]) -> S:
    """Read the section ``name`` of a params file; dots descend, as in ``encode.sft``.

    What it shares with the others and does not set itself is the top level's.

    Raises:
        UserError: the file or section is missing, a key is unknown or missing, or a value is
            out of range; the message names file, key, value found and what is allowed.
    """
    tree = value = read_params(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is {tree!r}; it must be sections with keys, as `{name}:`.")
    for depth, part in enumerate(parts := name.split(".")):
        is_mapping = isinstance(value, dict)
        if not is_mapping or part not in value:
            where = ".".join(parts[:depth]) or "the file"
            sections = [str(key) for key in value if key not in SHARED] if is_mapping else []
            known = ", ".join(sections) or "none"
            raise UserError(f"{path}: {name} is missing; {where} has the sections: {known}.")
        value = value[part]
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {value!r}; it must be a section with keys.")
    values = with_shared(value, tree, section)
    if missing := [key for key in shared_keys(section) if key not in values]:
        raise UserError(f"{path}: {' and '.join(missing)} is missing; add it.")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        inherited = [key for key in shared_keys(section) if value.get(key) is None]
        problems = [_describe(name, detail, section, inherited) for detail in error.errors()]
        raise UserError(f"{path}: {'; '.join(problems)}") from None


def shared_keys(section: type[Section]) -> list[str]:
    """Those keys that a section of this class has from the top level, unless it sets them."""
    return [key for key in SHARED if key in section.model_fields]


def with_shared(values: dict[str, Any], tree: Any, section: type[Section]) -> dict[str, Any]:
    """A section's values, with those from the top level of `tree` that it does not set itself."""
    inherited = [key for key in shared_keys(section) if values.get(key) is None]
    own = {key: value for key, value in values.items() if key not in inherited}
    return own | {key: tree[key] for key in inherited if key in tree}


def load_path(path: Path, key: str) -> Path:
    """A path that a params file says, as in `data.prompts`.

    Raises:
        UserError: the key is missing, or no text.
    """
    value = read_params(path)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: {key} is {value!r}; it must be a path.")
    return Path(value)


def read_params(path: Path) -> Any:
    """What a params file holds.

    Raises:
        UserError: it is missing, not UTF-8 or not YAML, or a key stands there twice.
    """
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
    except (ValueError, OverflowError, RecursionError) as error:  # "\\U00110000", 20,000 brackets
        raise UserError(f"{path}: not valid YAML: {error}; correct it.") from None


def _describe(name: str, detail: ErrorDetails, section: type[Section], inherited: list[str]) -> str:
    where = [] if detail["loc"][:1] in [(key,) for key in inherited] else [name]
    key = ".".join([*where, *map(str, detail["loc"])])
    match detail["type"]:
        case "extra_forbidden":
            keys: Any = section  # the one that does not know it
            for part in detail["loc"][:-1]:
                keys = keys.model_fields[part].annotation
            allowed = ", ".join(sorted(keys.model_fields))
            return f"{key} is not a known key; allowed are {allowed}"
        case "missing":
            return f"{key} is missing; add it"
        case _:
            reason = complaint(detail)
            found = detail["input"]
            return (
                f"{key}: {reason}" if isinstance(found, dict) else f"{key} is {found!r}; {reason}"
            )
