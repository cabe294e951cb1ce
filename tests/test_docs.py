"""What the documents name exists, and README.md and README.zh.md say the same."""

import re
import subprocess
import tomllib
from importlib import import_module
from itertools import zip_longest
from typing import Any

import pytest
import yaml

from minimind.compute.settings import RuntimeSettings
from minimind.lineage.code import stage_names
from minimind.params import SHARED, Section
from tests.graph import ROOT

PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
TRAINED = [
    name for name, section in PARAMS.items() if isinstance(section, dict) and "lr" in section
]

_CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PICTURE = re.compile(r"!\[.*\]\((.*)\)")
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_KEY = re.compile(r"(\+\+)?(<stage>|[a-z][a-z0-9_]*)((?:\.[a-z][a-z0-9_]*)+)(?::? .*)?")
_SET_KEY = re.compile(r"-S '?(\+{0,2}[\w.]+)=")
_FILE = re.compile(r".*\.(py|md|json|jsonl|yaml|toml|lock|txt|csv|npy|safetensors|pth)")
_VARIABLE = re.compile(r"MINIMIND_[A-Z]+(?:_[A-Z]+)*")
_NOT_OURS = ("torch",)  # of dotted names
# Secrets: read where they are used, so that they are in no settings and no record.
_SECRETS = {"MINIMIND_API_KEY", "MINIMIND_PASSWORD"}


def documents() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A document without its code blocks."""
    return _CODE_BLOCK.sub("", text)


def fields(section: type[Section] = Section) -> set[str]:
    """Every key of every section, those that params.yaml does not list among them."""
    for name in stage_names():
        import_module(f"stages.{name}")
    return {*section.model_fields}.union(*map(fields, section.__subclasses__()))


def is_param(dotted: str) -> bool:
    """Whether params.yaml lists a key; of ++key, whether a section has it."""
    if dotted.startswith("++"):
        return dotted.rpartition(".")[2] in fields()
    value: Any = PARAMS
    keys = dotted.split(".")
    if len(keys) > 1 and keys[-1] in SHARED:  # a section may have its own
        keys.pop()
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def params_named(text: str) -> list[str]:
    """Parameters that a document names: `sft.lr`, `data.on_bad_row: skip`, -S sft.lr=1e-5.

    `<stage>.lr` stands for that key of every section that trains, `++sft.grad_clip` for one that
    params.yaml does not list: -S '++sft.grad_clip=0.5'.
    """
    named = _SET_KEY.findall(text)
    for code in _INLINE_CODE.findall(prose(text)):
        match = _KEY.fullmatch(code)
        if match is None or _FILE.fullmatch(code) or match[2] in _NOT_OURS:
            continue
        sections = TRAINED if match[2] == "<stage>" else [match[2]]
        named += [(match[1] or "") + section + match[3] for section in sections]
    return named


def environment_variables() -> set[str]:
    """What MINIMIND_* variables there are; the others of the settings are DVC's own."""
    fields = RuntimeSettings.model_fields.items()
    return {f"MINIMIND_{name.upper()}" for name, field in fields if field.validation_alias is None}


@pytest.mark.parametrize("name", documents())
def test_relative_links_lead_somewhere(name: str) -> None:
    links = [link.split("#")[0] for link in _LINK.findall(prose(read(name)))]
    links = [link for link in links if link and not re.match(r"\w+:", link)]
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing, f"{name} links to {missing}"


@pytest.mark.parametrize("name", documents())
def test_parameters_and_variables_that_documents_name_exist(name: str) -> None:
    text = read(name)
    unknown = [key for key in params_named(text) if not is_param(key)]
    unknown += sorted({*_VARIABLE.findall(text)} - environment_variables() - _SECRETS)
    assert not unknown, f"{name} names {unknown}"


def test_the_argument_table_names_parameters_of_every_training_stage() -> None:
    named = params_named(read("docs/from-minimind.md"))
    assert len(TRAINED) >= 8
    for section in TRAINED:
        assert f"{section}.lr" in named


def test_the_settings_page_has_every_variable_in_both_languages() -> None:
    for text in read("docs/settings.md").split("# 设置\n", 1):
        assert set(_VARIABLE.findall(text)) - _SECRETS == environment_variables()


@pytest.mark.parametrize("name", documents())
def test_stages_that_documents_run_are_in_the_graph(name: str) -> None:
    for command in re.findall(r"dvc (?:repro|exp run)\b([^`#\n|]*)", read(name)):
        words = re.sub(r"-S \S+|--?name \S+|(?<!\S)--?[\w-]+|\.{3}", "", command).split()
        for word in words:
            file, _, asked = word.rpartition(":")
            if asked.endswith("/dvc.yaml"):  # a whole graph
                assert (ROOT / asked).is_file()
                continue
            stages: dict[str, Any] = yaml.safe_load(read(file or "dvc.yaml"))["stages"]
            stage, _, item = asked.partition("@")
            assert stage in stages, f"{name}: dvc.yaml has no stage {word}"
            items = stages[stage].get("foreach", {})
            assert isinstance(items, str) or not item or item in items, f"{name}: no {word}"


def test_both_readmes_have_the_same_parts() -> None:
    english, chinese = read("README.md"), read("README.zh.md")

    def headings(text: str) -> list[str]:
        return re.findall(r"^(#+) ", prose(text), re.MULTILINE)

    def links(text: str) -> list[str]:
        """To the page in Chinese, where there is one, as to the English one."""
        found = {link.replace(".zh.md", ".md") for link in _LINK.findall(prose(text))}
        return sorted(found - {"README.md"})

    def table_rows(text: str) -> int:
        return len(re.findall(r"^\|", prose(text), re.MULTILINE))

    assert headings(english) == headings(chinese)
    assert links(english) == links(chinese)
    assert table_rows(english) == table_rows(chinese)
    assert "](README.zh.md)" in english
    assert "](README.md)" in chinese


PAGES = ("plan", "orchestrator", "project", "explain", "compare")


@pytest.mark.parametrize("page", ["README", *(f"docs/{page}" for page in PAGES)])
def test_both_languages_have_the_same_code_and_pictures(page: str) -> None:
    def code(name: str) -> list[list[str]]:
        return [
            [without_comment(line, language) for line in block.splitlines()]
            for language, block in _CODE_BLOCK.findall(read(name))
        ]

    def without_comment(line: str, language: str) -> str:
        """A picture's comments have no sign: they stand three spaces or more behind what it is."""
        return re.sub(r"(^|\s)#.*" if language else r"(?<=\S) {3,}.*", "", line).rstrip()

    for english, chinese in zip_longest(code(f"{page}.md"), code(f"{page}.zh.md")):
        assert english == chinese
    english, chinese = (_PICTURE.findall(read(f"{page}{end}")) for end in (".md", ".zh.md"))
    assert english == chinese


def test_every_package_that_is_asked_for_has_an_exact_version() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    asked = sum(project["optional-dependencies"].values(), project["dependencies"])
    exact = {line.partition("==")[0].lower() for line in read("constraints.txt").splitlines()}
    names = {re.match(r"[\w.-]+", package)[0].lower() for package in asked}
    assert names - exact == {"minimind-dvc"}
