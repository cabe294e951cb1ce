"""Refuse parameters that a shell would act on: python -m minimind.terminal.shell_safe

DVC writes parameters into the commands of dvc.yaml and hands these to a shell, before any code of
a stage could look at them. There they stand in single quotes, out of which nothing leads but a
single quote. So each stage that has parameters in its command runs this first, on its own.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_TEMPLATE = re.compile(r"\$\{([\w.]+)\}")


def unsafe_parameters(graph: str, params: Any) -> Iterator[str]:
    """A line for each parameter named in the text of dvc.yaml that must not go to a shell."""
    for name in sorted(set(_TEMPLATE.findall(graph))):
        value = params
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        for text in map(str, value if isinstance(value, list) else [value]):
            if "'" in text or not text.isprintable():
                yield f"{name} is {text!r}; it must be without quotes and control characters."


def main() -> int:
    """0 if all is well, else 1 and a line on stderr."""
    graph = Path("dvc.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # starts faster where there is libyaml
    params = yaml.load(Path("params.yaml").read_text(encoding="utf-8"), loader)
    for line in unsafe_parameters(graph, params):
        print(f"params.yaml: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
