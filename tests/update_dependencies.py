"""Rewrite the code dependencies in dvc.yaml from imports: python -m tests.update_dependencies

In a stage's deps, the run of lines that begin with `- stages/` or `- minimind/` is replaced.
"""

import re

from tests.graph import ROOT, code_dependencies


def updated(text: str) -> str:
    """dvc.yaml's text with the code dependencies of every stage brought up to date."""
    lines: list[str] = []
    stage_file = ""
    written = False
    for line in text.splitlines():
        if command := re.search(r"python -m (stages\.\w+)", line):
            stage_file, written = command[1].replace(".", "/") + ".py", False
        if entry := re.match(r"( +- )(CODE )?(stages|minimind)/", line):
            if not written:
                lines += [entry[1] + file for file in code_dependencies(stage_file)]
            written = True
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    graph = ROOT / "dvc.yaml"
    graph.write_text(updated(graph.read_text(encoding="utf-8")), encoding="utf-8")
