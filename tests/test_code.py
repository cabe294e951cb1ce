"""Digests of code: what changes them, and what does not."""

import ast
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

from minimind.errors import UserError
from minimind.lineage import code
from minimind.lineage.code import code_of, digest_of, stage_names, write_code

SOURCE = '''
"""What it is."""
from dataclasses import dataclass, field  # a comment

@dataclass(frozen=True)
class Loss:
    """A loss."""

    weight: float = 1e-3
    names: tuple[str, ...] = ("损失", "b")
    """What each is called."""

    def __call__(self, x: "Tensor", *rest: int, scale: float | None = None, **more: object) -> str:
        match rest:
            case [first, *_] if first > 0:
                return f"{x!r:>{first}}" + f"{scale=}" rf"\\{x}"
            case {"a": 1, **others}:
                return "a" "b" + str(others)
        return [y async for y in x] or -1 or 0x10 or 1_000 or b"\\x00" or ... or (lambda: None)
'''


def digest(source: str) -> str:
    return digest_of(ast.parse(source))


def test_a_digest_is_the_same_on_every_python() -> None:
    """Written down: another number of any Python that is tried is a fault of the digest."""
    assert digest(SOURCE) == "8ede2dbd35776f69"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a comment", ""),
        ('"""What it is."""', '"""Something else."""'),
        ('    """A loss."""\n', ""),
        ('    """What each is called."""\n', ""),
        ('("损失", "b")', "(\n        '损失',\n        'b',\n    )"),
        ("0x10", "16"),
        ("1_000", "1000"),
        ('"a" "b"', "'ab'"),
        ("\n\n", "\n\n\n\n"),
        ("(lambda: None)", "((lambda: None))"),
    ],
)
def test_comments_docstrings_and_layout_do_not_change_it(old: str, new: str) -> None:
    assert old in SOURCE
    assert digest(SOURCE.replace(old, new)) == digest(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1e-3", "1e-4"),
        ("weight: float", "weight: int"),  # pydantic reads annotations
        ('"损失"', '"损"'),
        ("first > 0", "first >= 0"),
        ("scale: float | None = None", "scale: float | None"),
        ("*rest: int", "rest: int"),
        ("{x!r:>", "{x!s:>"),
        ("-1 or", "1 or"),
        ('b"\\x00"', '"\\x00"'),
        ("(lambda: None)", "(lambda: False)"),
        ("frozen=True", ""),
        ("async for", "for"),
    ],
)
def test_what_the_code_says_changes_it(old: str, new: str) -> None:
    assert old in SOURCE
    assert digest(SOURCE.replace(old, new)) != digest(SOURCE)


# ---- whole stages, in a project of a few lines ----

FILES = {
    "minimind/__init__.py": "def __getattr__(name): return __import__(name)",
    "minimind/a.py": "from minimind.b import two",
    "minimind/b.py": "two = 2",
    "minimind/c.py": "c = 3",
    "minimind/late.py": "late = 4",
    "minimind/tasks/__init__.py": "",
    "minimind/tasks/one.py": "import minimind.c",
    "minimind/compute/__init__.py": "",
    "minimind/compute/device.py": "from minimind.compute import precision",
    "minimind/compute/precision.py": "bits = 16",
    "stages/__init__.py": "import minimind.late",
    "stages/sft.py": "import minimind.a\nimport minimind.compute.device",
    "stages/report.py": "import minimind.c",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        write(tmp_path / name, text)
    monkeypatch.setattr(code, "_folder_of", lambda top: tmp_path / top)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")


def forget() -> None:
    for name in ("imports_of", "_path_of", "_all_modules", "_parsed"):
        getattr(code, name).cache_clear()


def modules_after(project: Path, **changes: str) -> set[str]:
    for name, text in changes.items():
        write(project / name.replace("__", "/").replace("_py", ".py"), text)
    forget()
    return {*code_of("sft")}


SFT = {"stages.sft", "minimind.a", "minimind.b", "minimind.compute.precision"}


def test_imports_are_followed(project: Path) -> None:
    """Through what decides only how, but that is not in it, and not the library's lazy names."""
    assert modules_after(project) == SFT
    assert {*code_of("report")} == {"stages.report", "minimind.c"}
    assert stage_names() == ["report", "sft"]


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("from minimind import c", {"minimind.c"}),
        ("from . import c", {"minimind.c"}),
        ("from .c import c", {"minimind.c"}),
        ("def f():\n    from minimind.c import c", {"minimind.c"}),
        ("import importlib\nimportlib.import_module('minimind.c')", {"minimind.c"}),
        ("from importlib import import_module as i", set()),
        (
            "from importlib import import_module\ndef f(n): import_module(f'minimind.tasks.{n}')",
            {"minimind.tasks.one", "minimind.c"},
        ),
        ("def f(n): __import__('minimind.tasks.' + n)", {"minimind.tasks.one", "minimind.c"}),
        ("import json, torch.nn", set()),
        ("from minimind.tasks import one", {"minimind.tasks", "minimind.tasks.one", "minimind.c"}),
    ],
)
def test_every_way_to_import_is_followed(project: Path, text: str, more: set[str]) -> None:
    found = modules_after(project, minimind__b_py=text)
    assert found - {"minimind.tasks"} == SFT | more - {"minimind.tasks"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("from importlib import import_module\ndef f(n): import_module(n)", "b.py:2: which module"),
        ("from minimind import two", "b.py:1: two is imported from minimind, which loads it when"),
        ("def", "b.py:1: not Python"),
    ],
)
def test_what_cannot_be_followed_is_one_line(project: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        modules_after(project, minimind__b_py=text)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        write_code(project / "code", ["sft"])
    assert not (project / "code").exists()


def test_a_file_beside_a_module_counts_where_it_is_named(project: Path) -> None:
    write(project / "minimind/words.json", "[1]")
    before = code_of("sft")
    assert "minimind/words.json" not in before
    found = modules_after(project, minimind__b_py="two = open('words.json')")
    assert "minimind/words.json" in found
    first = code_of("sft")
    write(project / "minimind/words.json", "[2]")
    assert code_of("sft") != first


def changed_by(project: Path, change: Callable[[Path], None]) -> set[str]:
    """Stages whose file in code/ another code changes."""
    write_code(project / "before", stage_names())
    change(project)
    forget()
    write_code(project / "after", stage_names())
    pairs = [
        (file.stem, file.read_text(), (project / "after" / file.name).read_text())
        for file in (project / "before").iterdir()
    ]
    return {stage for stage, before, after in pairs if before != after}


@pytest.mark.parametrize(
    ("file", "text", "stages"),
    [
        ("minimind/b.py", "# a comment\ntwo = 2\n", set()),
        ("minimind/b.py", "two = 3", {"sft"}),
        ("minimind/c.py", "c = 4", {"report"}),
        ("minimind/compute/device.py", "from minimind.compute import precision\nx = 1", set()),
        ("minimind/compute/precision.py", "bits = 8", {"sft"}),
        ("minimind/__init__.py", "names = 1", set()),
        ("minimind/late.py", "late = 5", set()),
    ],
)
def test_a_change_reaches_the_stages_that_use_it(
    project: Path, file: str, text: str, stages: set[str]
) -> None:
    assert changed_by(project, lambda folder: write(folder / file, text)) == stages


def test_code_is_found_where_an_editable_install_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds a finder of its own; outside the clone, the path of modules does not lead there."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            file, places = tmp_path / "__init__.py", [str(tmp_path)]
            found = spec_from_file_location(name, file, submodule_search_locations=places)
            return found if name == "elsewhere" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert code._folder_of("elsewhere") == tmp_path


# ---- the project itself ----


def test_a_change_of_report_or_command_line_retrains_nothing() -> None:
    for stage in ("pretrain", "sft", "dpo", "reason", "grpo", "distill", "lora"):
        packages = {name.split(".")[1] for name in code_of(stage) if "." in name}
        assert not packages & {"report", "cli", "lineage", "terminal"}
        assert "minimind.training.session" in code_of(stage)
        assert "minimind.compute.precision" in code_of(stage)


def test_losses_are_digested_where_they_are_used() -> None:
    for loss, stages in (("dpo", {"dpo"}), ("preference", {"dpo", "reference"})):
        module = f"minimind.objectives.{loss}"
        assert {stage for stage in stage_names() if module in code_of(stage)} == stages


def test_what_is_written_is_read_by_people(tmp_path: Path) -> None:
    write_code(tmp_path / "code", ["sft"])
    text = (tmp_path / "code/sft.json").read_text()
    assert json.loads(text) == code_of("sft")
    assert len(text.splitlines()) == len(code_of("sft")) + 2


def test_every_module_can_be_written_as_text() -> None:
    """Also those that no stage imports."""
    for path in code.source_files():
        if path.suffix == ".py":
            assert len(digest(path.read_text(encoding="utf-8"))) == 16
