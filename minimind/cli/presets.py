"""Presets: named sets of parameters, written into params.yaml without losing its comments."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from minimind.errors import UserError
from minimind.files import replacing
from minimind.project.template import shipped

Values = dict[str, Any]


def read_preset(directory: Path, name: str, extended_by: tuple[str, ...] = ()) -> Values:
    """The preset's values, those of the preset that it extends beneath them.

    A preset that is not in `directory` is one of those that are shipped.
    """
    path = directory / f"{name}.yaml"
    if not path.is_file():
        path = shipped(f"presets/{name}.yaml")
    if not path.is_file():
        files = [*sorted(directory.glob("*.yaml")), *sorted(shipped("presets").glob("*.yaml"))]
        known = ", ".join(dict.fromkeys(file.stem for file in files))
        raise UserError(f"there is no preset {name!r} in {directory}/; there are: {known}.")
    try:
        values = YAML(typ="safe").load(path)
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}; correct it.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections with keys, as params.yaml does.")
    if (base := values.pop("extends", None)) is not None:
        if base in (*extended_by, name):
            raise UserError(f"{path}: extends leads back to {base}; name another preset.")
        return merge(read_preset(directory, base, (*extended_by, name)), values)
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

    Comments and the order of keys stay. A key that a section does not list is added; a section
    that the file does not have is an error: nothing is written then.
    """
    parser = YAML()
    parser.preserve_quotes = True
    parser.width = 100
    try:
        document = parser.load(params)
    except FileNotFoundError:
        raise UserError(f"{params} is missing; run from the project's root folder.") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{params} is not valid YAML: {error}; correct it.") from None
    changes = _update(document, preset, "")
    with replacing(params) as partial, partial.open("w", encoding="utf-8") as file:
        parser.dump(document, file)
    return changes


def _update(section: Any, values: Values, prefix: str) -> list[str]:
    changes = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(section, dict) and prefix and not isinstance(value, dict):
            section.setdefault(key)  # the stage says so, if it does not know it
        if not isinstance(section, dict) or key not in section:
            raise UserError(f"the preset sets {name}, which params.yaml does not have.")
        if isinstance(value, dict) != isinstance(section[key], dict):
            raise UserError(f"the preset sets {name} to {value!r}; in params.yaml it is otherwise.")
        if isinstance(value, dict):
            changes += _update(section[key], value, f"{name}.")
        elif section[key] != value:
            changes.append(f"{name}: {section[key]} -> {value}")
            section[key] = value
    return changes
