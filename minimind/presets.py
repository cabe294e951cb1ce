"""Presets: named sets of parameters, written into params.yaml without losing its comments."""

from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML

from minimind.errors import UserError

Values = dict[str, Any]


def read_preset(directory: Path, name: str) -> Values:
    """The preset's values, those of the preset that it extends beneath them."""
    path = directory / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in directory.glob("*.yaml"))) or "none"
        raise UserError(f"there is no preset {name!r} in {directory}/; there are: {known}.")
    values: Values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if (base := values.pop("extends", None)) is not None:
        return merge(read_preset(directory, base), values)
    return values


def merge(below: Values, above: Values) -> Values:
    """`below` with the values of `above` in the place of its own, section by section."""
    merged = dict(below)
    for key, value in above.items():
        inside = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if inside else value
    return merged


def apply_preset(params: Path, preset: Values) -> list[str]:
    """Write a preset's values into a params file; returns a line for each value that changed.

    Comments and the order of keys stay. A key the file does not have is an error: nothing is
    written then.
    """
    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 100
    document = parser.load(params)
    changes = list(_update(document, preset, ""))
    partial = params.with_name(params.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        parser.dump(document, file)
    partial.rename(params)
    return changes


def _update(section: Any, values: Values, prefix: str) -> list[str]:
    changes = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in section:
            raise UserError(f"the preset sets {name}, which params.yaml does not have.")
        if isinstance(value, dict):
            changes += _update(section[key], value, f"{name}.")
        elif section[key] != value:
            changes.append(f"{name}: {section[key]} -> {value}")
            section[key] = value
    return changes
