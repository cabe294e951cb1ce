"""Break rows, parameters and states in a thousand ways; each command must refuse, or do, its work.

    python -m benchmarks.fuzz                    # 1,000 cases: ten minutes
    python -m benchmarks.fuzz --only 417         # one of them again, with all that it printed

A case changes one file of a tiny project whose stages have all run: rows of data, params.yaml, or
what stages and DVC have left (checkpoints, encoded data, dvc.lock, records, resume checkpoints).
Then a command that reads the file runs on it. It may succeed, or end with one line that names the
matter; a traceback, a hang, or a file written by a command that refuses is a failure. What is
drawn depends on the seed and the number of the case alone.
"""

import argparse
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.under_dvc import record
from benchmarks.victims import Stage, build_project
from benchmarks.warm import StageProcess

LIMIT_SECONDS = {"cpu": 30, "wall": 600}  # of a command that takes one
LONGEST_LINE = 2000  # characters of a complaint
OUTPUTS = ("--output", "--metrics", "--history", "--predictions", "--rejected", "--page")
STATES = (".resume/", ".dvc/", ".git/")  # what commands may write although they refuse
ANYTHING: list[Any] = [None, True, 0, -1, 1.5, float("nan"), float("inf"), 1e308, 10**30, 2**63]
ANYTHING += ["", " ", "x", "\ud800", "\0", "a" * 2**20, "1e3", "1_000", "１２", ".", "..", "/"]
ANYTHING += [[], {}, [[]], [1], ["x"], {"": {}}, [None], {"role": "bot"}, [{}] * 3, "<think>"]
JUNK = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\x80", b'"', b"{", b"}", b"]"]
JUNK += [b"[" * 10**5, b"9" * 5000, b"NaN", b"null", b"-", b"\\ud800", b"\\", b": ", b"\t", b"#"]
YAML = ["*x", "&x [*x]", "!!python/name:os.system", "!x y", "{", "[", "'", ">", "? x", "2001-99-99"]
YAML += ["1:30", "0o17", "0x1F", "1_000", ".nan", "-.inf", "~", "yes", "&x 1\n<<: *x", "<<: [1]"]
YAML += ["- 1", "@", "%", "!!binary x", "!!set {a}", "!!timestamp x", "!!int ''", '"\\UFFFFFFFF"']
BOMB = "b0: &b0 [x]\n"  # a third of a billion values
BOMB += "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 10))


@dataclass(frozen=True)
class Target:
    """A file, and the commands that read it."""

    file: str
    commands: list[str]

    @property
    def folder(self) -> str:
        return self.file.split("/")[0]


@dataclass(frozen=True)
class Case:
    """What is broken, and who meets it."""

    file: str
    command: str
    contents: bytes


def broken_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, put in, taken out or repeated somewhere."""
    at, to = sorted(rng.randint(0, len(data)) for _ in range(2))
    match rng.randrange(6):
        case 0:
            changed = bytearray(data or b"x")
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[min(to, at + 40) :]
        case 3:
            return data[:at] + rng.randbytes(rng.randint(1, 40)) + data[at:]
        case 4:
            return data[:to] + data[at:]
    return data[:at] + rng.choice(JUNK) + data[at:]


def broken_value(value: Any, rng: random.Random) -> Any:
    """A tree with another value, a key less or a key more somewhere."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return deep(rng) if rng.random() < 0.05 else rng.choice(ANYTHING)
    changed = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key = rng.choice(list(changed))
    match rng.randrange(8):
        case 0:
            del changed[key]
        case 1:
            new = rng.choice(["x", "messages", "role", "", "seed", str(key).upper(), f"{key} "])
            changed[new if isinstance(value, dict) else len(value)] = rng.choice(ANYTHING)
        case 2:
            changed[key] = rng.choice(list(changed.values()))
        case _:
            changed[key] = broken_value(changed[key], rng)
    return changed if isinstance(value, dict) else list(changed.values())


def deep(rng: random.Random) -> Any:
    value: Any = "x"
    for _ in range(rng.choice([30, 150])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def broken_json(data: bytes, rng: random.Random) -> bytes:
    """Another value somewhere, or a key that stands there twice, or bytes."""
    try:
        value = json.loads(data)
    except ValueError:  # not JSON alone, or broken already
        return broken_bytes(data, rng)
    if rng.random() < 0.3:
        return broken_bytes(data, rng)
    text = json.dumps(broken_value(value, rng), ensure_ascii=rng.random() < 0.7)
    if isinstance(value, dict) and value and rng.random() < 0.1:
        twice = json.dumps({rng.choice(list(value)): rng.choice(ANYTHING)})
        text = f"{twice[:-1]}, {text[1:]}"
    return text.encode("utf-8", "surrogatepass")


def broken_rows(data: bytes, rng: random.Random) -> bytes:
    """One row or a few broken, or the file as a whole."""
    if rng.random() < 0.15:
        return broken_bytes(data, rng)
    lines = data.splitlines()
    for _ in range(rng.choice([1, 1, 3])):
        number = rng.randrange(min(len(lines), 30))
        lines[number] = broken_json(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def broken_yaml(data: bytes, sections: list[str], rng: random.Random) -> bytes:
    """Another value in one of the sections, or other text in the place of one."""
    text = data.decode("utf-8")
    match rng.randrange(8):
        case 0:
            return broken_bytes(data, rng)
        case 1 | 2:
            lines = text.splitlines()
            number = rng.randrange(len(lines))
            start = lines[number].partition(":")[0]
            lines[number] = f"{start}: {rng.choice(YAML)}"
            return "\n".join(lines).encode()
    tree = yaml.safe_load(text)
    section = rng.choice(sections)
    if rng.random() < 0.05:
        tree[section] = "BOMB"
        return (BOMB + yaml.safe_dump(tree).replace("BOMB", "*b9")).encode()
    tree[section] = broken_value(tree[section], rng)
    return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")


class Fuzz:
    """The tiny project, as it was built, and what was seen."""

    def __init__(self, project: Path, stages: dict[str, Stage], seed: int) -> None:
        self.project, self.seed = project, seed
        self.counts = Counter[str]()
        self.whole = project.with_name("whole")
        shutil.rmtree(self.whole, ignore_errors=True)
        shutil.copytree(project, self.whole, symlinks=True)
        self.marks = dict(self._marks())
        self.targets = self._targets(stages)

    def _targets(self, stages: dict[str, Stage]) -> dict[str, list[Target]]:
        """Files by what they are: rows, parameters, states."""
        lock = yaml.safe_load((self.project / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        commands = {name: redirected(stages[name].command) for name in lock}
        self.sections = {commands[name]: sections(lock[name]) for name in lock}
        cli = "python -m minimind.cli.main"
        project = [f"{cli} verify", f"{cli} resume", "python -m minimind.cli.table"]
        rows, states = [], []
        for file in sorted(self.marks):
            readers = [
                commands[name]
                for name, entry in lock.items()
                for dep in entry.get("deps", [])
                if file == dep["path"] or file.startswith(f"{dep['path']}/")
                if not file.endswith(".py") and not file.startswith(("code/", "minimind/"))
            ]
            if file.endswith(".jsonl") and file.startswith("data/mini_world"):
                readers += [f"{cli} lint {file}", f"{cli} lint {file} --tokenizer models/tokenizer"]
                rows.append(Target(file, readers))
            elif file.startswith(".resume/") and file.count("/") > 2:
                stage = file.split("/")[1].replace("-", "@")
                states.append(Target(file, [commands[stage]] * 3 + project[1:2]))
            elif file.startswith(("runs/", "metrics/", "models/", "dvc.")):
                states.append(Target(file, readers * 3 + project))
            elif readers:
                states.append(Target(file, readers))
        readers = [name for name, read in self.sections.items() if read]
        params = [Target("params.yaml", [*readers, f"{cli} preset tiny"])]
        return {"rows": rows, "params": params, "states": states}

    def case(self, number: int) -> Case:
        rng = random.Random(f"{self.seed} {number}")
        kind = ["rows", "params", "states"][number % 3]
        folder = rng.choice(sorted({target.folder for target in self.targets[kind]}))
        target = rng.choice([t for t in self.targets[kind] if t.folder == folder])
        command = rng.choice(target.commands)
        data = (self.whole / target.file).read_bytes()
        if kind == "rows" or target.file.endswith(".jsonl"):
            contents = broken_rows(data, rng)
        elif kind == "params" or target.file in ("dvc.yaml", "dvc.lock"):
            names = self.sections.get(command) or ["sft"]
            contents = broken_yaml(data, names if kind == "params" else ["stages"], rng)
        elif target.file.endswith(".json"):
            contents = broken_json(data, rng)
        else:
            head = data[: rng.choice([9, 3000, len(data)])]  # where formats have what they have
            contents = broken_bytes(head, rng) + data[len(head) :]
        return Case(target.file, command, contents)

    def run(self, number: int, loud: bool = False) -> None:
        case = self.case(number)
        if case.file.startswith(".resume/"):  # to be gone on from, and not as recorded
            for marker in self.project.glob(".resume/*/*/finished.json"):
                marker.unlink()
        else:
            shutil.rmtree(self.project / ".resume", ignore_errors=True)
        (self.project / case.file).unlink(missing_ok=True)  # a link may be another output's, too
        (self.project / case.file).write_bytes(case.contents)
        environment = {"MINIMIND_THREADS": "1", "DVC_STAGE": "", "DVC_ROOT": "."}
        log = self.project.with_name("fuzz.log")
        process = StageProcess(self.project, case.command, log, environment)
        while (hangs := process.is_running()) and not has_hung(process):
            time.sleep(0.02)
        process.send(signal.SIGKILL)
        code = process.finish()
        printed = log.read_text(encoding="utf-8", errors="replace")
        changed = self._restore(case)
        lines = [line for line in printed.splitlines() if line.strip()]
        crashed = "Traceback (most recent call last)" in printed or (code < 0 and not hangs)
        faults = {
            "hangs": hangs,
            "tracebacks": crashed,
            "writes": code != 0 and bool(changed),
            "unclear": code != 0
            and not (hangs or crashed or " lint " in case.command)
            and not re.match(r"\w+: ", "".join(lines[-1:])),
            "long": any(len(line) > LONGEST_LINE for line in lines),
        }
        self.counts += Counter({"cases": 1, "refused": code != 0})
        self.counts += Counter({fault: int(is_so) for fault, is_so in faults.items()})
        if loud or any(faults.values()):
            found = ", ".join(fault for fault, is_so in faults.items() if is_so) or "fine"
            print(f"case {number} (seed {self.seed}): {found}: exit {code}: {case.file}")
            print(f"  {case.command}\n  {changed}")
            for line in lines if loud else lines[-4:]:
                print(f"  | {line[:400]}")
            sys.stdout.flush()

    def _marks(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for folder, below, files in os.walk(self.project):
            below[:] = [name for name in below if name not in (".git", "__pycache__", "cache")]
            for file in files:
                path = os.path.join(folder, file)
                stat = os.stat(path)
                yield os.path.relpath(path, self.project), (stat.st_size, stat.st_mtime_ns)

    def _restore(self, case: Case) -> list[str]:
        """Files that a command has written; all is as it was afterwards."""
        now = dict(self._marks())
        changed = [f for f in {*now, *self.marks} if now.get(f) != self.marks.get(f)]
        written = [f for f in changed if f != case.file and not f.startswith(STATES)]
        path = self.project / case.file
        if not path.is_file() or path.read_bytes() != case.contents:
            written.append(case.file)
        for file in changed:
            (self.project / file).unlink(missing_ok=True)
            if file in self.marks:
                (self.project / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(self.whole / file, self.project / file)
        shutil.rmtree(self.project / "out", ignore_errors=True)
        return sorted(written)


def has_hung(process: StageProcess) -> bool:
    """Whether a command that is running has worked, or waited, for too long."""
    used = psutil.Process(process.pid).cpu_times()
    waited = time.time() - process.started
    return used.user + used.system > LIMIT_SECONDS["cpu"] or waited > LIMIT_SECONDS["wall"]


def redirected(command: str) -> str:
    """A stage's command that writes below out/."""
    words = command.split()
    for number, word in enumerate(words[:-1]):
        reads = "stages.report" in words or "stages.export" in words
        if word in OUTPUTS and not (word == "--predictions" and reads):
            words[number + 1] = f"out/{words[number + 1]}"
    return " ".join(words)


def sections(entry: dict[str, Any]) -> list[str]:
    """The sections of params.yaml that DVC tracks for a stage; and whose paths."""
    keys = entry.get("params", {}).get("params.yaml", {})
    return sorted({key.partition(".")[0] for key in keys})


def import_code() -> None:
    """All that the commands import, but not themselves: each runs as `__main__`."""
    from minimind.lineage.code import stage_names
    from minimind.lineage.provenance import loaded_code

    modules = [f"stages.{name}" for name in stage_names()]
    modules += ["minimind.cli.main", "minimind.cli.table", "minimind.lineage.resume"]
    for name in modules:
        importlib.import_module(name)
    for name in stage_names():
        loaded_code(name)  # which is remembered
    for name in modules[:-1]:
        del sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of a case")
    parser.add_argument("--stages", default="", help="kinds, with commas; all if left out")
    parser.add_argument("--output", type=Path, help="JSON of what happened")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder).resolve() / "tiny project"
        stages = build_project(project, [kind for kind in arguments.stages.split(",") if kind])
        record(project, stages)
        import_code()
        fuzz = Fuzz(project, stages, arguments.seed)
        if arguments.only is not None:
            fuzz.run(arguments.only, loud=True)
        else:
            for number in range(arguments.cases):
                fuzz.run(number)
    names = ("cases", "refused", "tracebacks", "hangs", "writes", "unclear", "long")
    results = {name: fuzz.counts[name] for name in names}
    print(json.dumps(results))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(results[name] for name in names[2:]))


if __name__ == "__main__":
    main()
