"""What a stage's module imports, to compare with what dvc.yaml says it depends on."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Decides how a result is computed, never what it is: see the modules' docstrings.
UNTRACKED = "minimind/runtime/"


@cache
def project_imports(file: str) -> frozenset[str]:
    """Files of the project that `file` imports itself, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            path = Path(*name.split(".")).with_suffix(".py")
            if name.split(".")[0] in ("minimind", "stages") and (ROOT / path).is_file():
                found.add(path.as_posix())
    return frozenset(found)


def code_dependencies(stage_file: str) -> list[str]:
    """`stage_file` and every file of the project it imports, however far, runtime apart."""
    reached, waiting = set(), [stage_file]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting.extend(project_imports(file))
    return sorted(file for file in reached if not file.startswith(UNTRACKED))
