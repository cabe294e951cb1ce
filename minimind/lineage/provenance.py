"""What a stage's result was made from, pinned when the stage starts and checked until it ends.

DVC hashes dependencies after the command has run. Without this check, an edit made during a
run would be recorded as if it had made the weights. What is edited between the last check and
DVC's hashing, the next stage finds by the record that is left here.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.lineage.code import code_of, modules_of
from minimind.lineage.dvc_files import md5_of_content, read_as_written, value_at
from minimind.lineage.edits import marks, was_edited
from minimind.lineage.paths import unreadable
from minimind.lineage.records import Records
from minimind.params import Section, load_section, shared_keys

CODE = Path("code")  # where stage `code`, or `minimind upgrade`, writes what stages depend on
PROJECT = Path(".minimind")  # what a project had from `minimind init` or `upgrade`; no clone has it


@dataclass(frozen=True)
class Pinned:
    """What was in one file, and its change marks then."""

    md5: str  # which dvc.lock has, too
    stat: os.stat_result

    @classmethod
    def of(cls, path: Path) -> "Pinned":
        with path.open("rb") as file:
            return cls(md5_of_content(file), os.fstat(file.fileno()))

    def still_holds(self, path: Path) -> bool:
        """Whether the file was left alone: an edit that was undone counts as a change.

        A file that DVC links into several workspaces changes its inode's time whenever a link
        comes or goes; for those alone the change time says nothing, and the content is compared.
        """
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        if marks(stat) != marks(self.stat):
            return False
        if stat.st_ctime_ns == self.stat.st_ctime_ns:
            return True
        linked = self.stat.st_nlink > 1 or stat.st_nlink > 1
        return linked and Pinned.of(path).md5 == self.md5


class Provenance:
    """What a result depends on: code of the project, inputs, sections of a params file."""

    def __init__(
        self,
        code: str,
        inputs: Iterable[Path],
        params: Path,
        sections: Mapping[str, Section],
        by_dvc: bool = False,
    ) -> None:
        """code: the module in stages/; inputs: files, and folders with all that is in them.

        by_dvc: whether DVC runs the stage, and so records code/<stage>.json as what it was made of.

        Raises:
            UserError: code was edited while it was imported, or is not that which DVC records;
                an input is missing, or the params file is no YAML to DVC.
        """
        self.code, self.params, self.sections = loaded_code(code), params, sections
        self.as_written = read_as_written(params) if sections else {}
        self.inputs = sorted({*_files(inputs)})
        recorded = CODE / f"{code}.json"
        digests = [recorded] if by_dvc and recorded.exists() else []
        self.files = {path: Pinned.of(path) for path in sorted({*self.inputs, *digests})}
        if digests and json.loads(recorded.read_text(encoding="utf-8")) != self.code:
            again = "it was edited since `dvc repro` began; run it again."
            if PROJECT.is_dir():
                again = "another version is installed; `minimind upgrade` says what it changes."
            raise UserError(f"{recorded} is not of the code that is here: {again}")

    def identity(self) -> dict[str, Any]:
        """What runs of the same code on the same inputs have in common, under DVC or not."""
        return {"code": self.code, "files": self._digests(self.inputs)}

    def _digests(self, paths: Iterable[Path]) -> dict[str, str]:
        return {str(path): self.files[path].md5 for path in paths}

    def check(self) -> None:
        """Raises UserError when a file or section is not what it was at the start."""
        changed = self._edited(self.files)
        for name, section in () if changed else self.sections.items():
            if load_section(self.params, name, type(section)) != section:
                changed.append(f"{self.params}: {name}")
        _refuse(changed)

    def check_inputs(self) -> None:
        """As :meth:`check` of what is read while the stage runs, files alone: an edit that is
        undone after a checkpoint was saved leaves no trace in what a resumed run starts from.
        """
        _refuse(self._edited(self.inputs))

    def _edited(self, paths: Iterable[Path]) -> list[str]:
        return [str(path) for path in paths if not self.files[path].still_holds(path)]

    def seal(self, records: Records, stage: str, contents: Mapping[str, Any]) -> None:
        """Check, leave the record of a run that is over, and check a last time.

        contents: without `metrics_md5` it is the hash of the stage's first output in dvc.yaml.

        Raises:
            UserError: as :meth:`check` does; there is no record then, nor will DVC make an entry.
        """
        self.check()
        shared = {key for section in self.sections.values() for key in shared_keys(type(section))}
        names = [*self.sections, *sorted(shared)]
        outs = records.outputs()
        made_from = {
            "metrics_md5": next(iter(outs.values()), None),
            "outs": outs,
            "code": self.code,
            "files": self._digests(self.files),
            "params": {str(self.params): {name: value_at(self.as_written, name) for name in names}},
        }
        file = records.write(stage, {**made_from, **contents})
        try:
            self.check()
        except UserError:
            file.unlink(missing_ok=True)
            raise


@contextmanager
def unchanged(
    stage: str, params: Path, sections: Mapping[str, Section], inputs: Iterable[Path]
) -> Iterator[None]:
    """Around the work of a stage that is too short for :func:`minimind.training.run.start_run`.

    stage: its module in stages/.

    Raises:
        UserError: inputs or sections were edited meanwhile, or those of an earlier stage before
            DVC recorded it.
    """
    started = time.monotonic()
    # Not by our settings, whose import takes longer than some of these stages.
    records = Records(Path(os.environ.get("DVC_ROOT", ".")), os.environ.get("DVC_STAGE", ""))
    records.refuse_false_lock()
    by_dvc = bool(records.stage) and stage != CODE.name  # which makes what the others depend on
    here = (path for path in inputs if path.exists())  # the stage misses others
    provenance = Provenance(stage, here, params, sections, by_dvc)
    yield
    if records.stage:
        seconds = round(time.monotonic() - started, 2)
        provenance.seal(records, records.stage, {"seconds": seconds})
    else:
        provenance.check()


def _refuse(changed: Sequence[str]) -> None:
    if changed:
        raise UserError(
            f"{', '.join(changed)} changed while the stage was running; "
            "nothing is recorded under false colours: run `dvc repro` again."
        )


def loaded_code(stage: str) -> dict[str, str]:
    """Digests of a stage's code, all of it loaded: what is edited from now on does not run.

    Raises:
        UserError: it was edited since this process began.
    """
    digests, modules = code_of(stage), modules_of(stage)
    for name in modules:
        if name != f"stages.{stage}":  # which runs, by the name of __main__
            import_module(name)
    if edited := [str(_relative(path)) for path in modules.values() if was_edited(path)]:
        raise UserError(
            f"{', '.join(edited)} changed while the stage was starting: run `dvc repro` again."
        )
    return digests


def _files(inputs: Iterable[Path]) -> Iterator[Path]:
    for path in inputs:
        if path.is_dir():
            yield from (_relative(file) for file in sorted(path.rglob("*")) if file.is_file())
        elif path.is_file():
            yield _relative(path)
        else:
            raise UserError(
                f"{path} is {unreadable(path)}; run the stage that makes it: `dvc repro`."
            )


def _relative(path: Path) -> Path:
    """Relative to the working folder where possible: the same names in every clone."""
    path = Path(os.path.abspath(path))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
