"""The files of a project outside the clone: the repository's own, without the stage `code`.

There the code is installed, and DVC cannot watch it. So git keeps `code/<stage>.json`, which
`minimind init` and `minimind upgrade` write, and stages depend on these as on any other file.
"""

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_SYNONYMS, _RECORD = "minimind/datasets/synonyms.json", "benchmarks/results/claims.json"
# Named by params.yaml and by what commands say; links from them lead nowhere in a project.
_PAGES = ("data.md", "project.md", "project.zh.md", "settings.md")
_LINK = re.compile(r"!?\[([^]]+)\]\((?!\w+:)[^)]+\)")
_STAGE_CODE = re.compile(r"^  code:.*?^(?=  \w)", re.MULTILINE | re.DOTALL)


def shipped(name: str) -> Path:
    """A file or folder of the repository, which the wheel has inside the package (setup.py)."""
    inside = PACKAGE / "shipped"
    return (inside if inside.is_dir() else PACKAGE.parent) / name


def kept_files() -> dict[str, str]:
    """The files that `minimind upgrade` keeps up to date, by their names in the project."""
    graph = _STAGE_CODE.sub("", _text(shipped("dvc.yaml")), 1)
    return {
        "params.yaml": _text(shipped("params.yaml")).replace(_SYNONYMS, "synonyms.json"),
        # The report without what is claimed of the built-in data.
        "dvc.yaml": graph.replace(f"--record {_RECORD} ", "").replace(f" {_RECORD},", ""),
        "synonyms.json": _text(PACKAGE / "datasets" / "synonyms.json"),
        ".gitignore": _text(shipped(".gitignore")),
        ".dvcignore": _text(shipped(".dvcignore")),
        **{f"docs/{page}": _LINK.sub(r"\1", _text(shipped(f"docs/{page}"))) for page in _PAGES},
    }


def first_files() -> dict[str, str]:
    """The files that a project begins with and that are its own from then on."""
    own = [
        f for top in ("rewards", "launchers", "lm-eval") for f in sorted(shipped(top).rglob("*"))
    ]
    return {
        "README.md": _text(PACKAGE / "project" / "README.md"),
        "README.zh.md": _text(PACKAGE / "project" / "README.zh.md"),
        **{name: _text(shipped(name)) for name in (".dvc/config", ".dvc/plots/history.json")},
        **{
            file.relative_to(shipped("")).as_posix(): _text(file)
            for file in own
            if file.is_file() and file.suffix not in (".pyc", ".lock")
        },
    }


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
