"""What a stage's result was made from, pinned when the stage starts and checked until it ends.

DVC hashes dependencies after the command has run. Without this check, an edit made during a
run would be recorded as if it had made the weights. What is edited between the last check and
DVC's hashing, the next stage finds by the record that is left here.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind.errors import UserError
from minimind.lineage.code import was_edited
from minimind.lineage.dvc_files import md5_of_content, read_as_written, value_at
from minimind.lineage.records import Records
from minimind.params import Section, load_section, shared_keys

RUNTIME_PACKAGE = "minimind.runtime"  # decides how, not what; see its modules
# Where modules that decide a result are found; a stage that runs is called by the last of these.
TRACKED_PACKAGES = ("minimind", "stages", "__main__")


@dataclass(frozen=True)
class Pinned:
    """Content and change marks of one file."""

    md5: str  # which dvc.lock has, too
    size: int
    inode: int
    modified_ns: int
    changed_ns: int
    links: int

    @classmethod
    def of(cls, path: Path) -> "Pinned":
        with path.open("rb") as file:
            digest = md5_of_content(file)
            stat = os.fstat(file.fileno())
        return cls(
            digest, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_nlink
        )

    def still_holds(self, path: Path) -> bool:
        """Whether the file was left alone: an edit that was undone counts as a change.

        A file that DVC links into several workspaces changes its inode's time whenever a link
        comes or goes; for those alone the change time says nothing, and the content is compared.
        """
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        marks = (stat.st_size, stat.st_ino, stat.st_mtime_ns)
        if marks != (self.size, self.inode, self.modified_ns):
            return False
        if stat.st_ctime_ns == self.changed_ns:
            return True
        linked = self.links > 1 or stat.st_nlink > 1
        return linked and Pinned.of(path).md5 == self.md5


class Provenance:
    """What a result depends on: inputs, sections of a params file, imported code of the project."""

    def __init__(
        self, inputs: Iterable[Path], params: Path, sections: Mapping[str, Section]
    ) -> None:
        """inputs: files, and folders with all that is in them.

        Raises:
            UserError: code was edited while it was imported, or an input is missing.
        """
        if edited := [str(path) for path in code_files() if was_edited(path)]:
            raise UserError(
                f"{', '.join(edited)} changed while the stage was starting: run `dvc repro` again."
            )
        self.files = {path: Pinned.of(path) for path in sorted({*code_files(), *_files(inputs)})}
        self.params = params
        self.sections = sections

    def digests(self) -> dict[str, str]:
        """MD5 by path."""
        return {str(path): pinned.md5 for path, pinned in self.files.items()}

    def check(self) -> None:
        """Raises UserError when a file or section is not what it was at the start."""
        changed = [str(path) for path, pinned in self.files.items() if not pinned.still_holds(path)]
        for name, section in () if changed else self.sections.items():
            if load_section(self.params, name, type(section)) != section:
                changed.append(f"{self.params}: {name}")
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed while the stage was running; "
                "nothing is recorded under false colours: run `dvc repro` again."
            )

    def seal(self, records: Records, stage: str, contents: Mapping[str, Any]) -> None:
        """Check, leave the record of a run that is over, and check a last time.

        Raises:
            UserError: as :meth:`check` does; there is no record then, nor will DVC make an entry.
        """
        self.check()
        tree = read_as_written(self.params) if self.sections else {}
        shared = {key for section in self.sections.values() for key in shared_keys(type(section))}
        names = [*self.sections, *sorted(shared)]
        made_from = {
            "files": self.digests(),
            "params": {str(self.params): {name: value_at(tree, name) for name in names}},
        }
        file = records.write(stage, {**contents, **made_from})
        try:
            self.check()
        except UserError:
            file.unlink(missing_ok=True)
            raise


@contextmanager
def unchanged(
    params: Path, sections: Mapping[str, Section], inputs: Iterable[Path]
) -> Iterator[None]:
    """Around the work of a stage that is too short for :func:`minimind.training.session.start_run`.

    Raises:
        UserError: code, inputs or sections of the params file were edited meanwhile, or those of
            the stage before it when DVC recorded that.
    """
    # Not by our settings, whose import takes longer than some of these stages.
    records = Records(Path(os.environ.get("DVC_ROOT", ".")), os.environ.get("DVC_STAGE", ""))
    records.refuse_false_lock()
    here = (path for path in inputs if path.exists())  # the stage misses others
    provenance = Provenance(here, params, sections)
    yield
    if records.stage:
        provenance.seal(records, records.stage, {"metrics_md5": records.metrics_md5()})
    else:
        provenance.check()


def code_files() -> list[Path]:
    """Source files of the project's imported modules that decide a result."""
    root = Path(__file__).resolve().parents[2]
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] not in TRACKED_PACKAGES or name.startswith(RUNTIME_PACKAGE):
            continue
        if not file:
            continue
        path = Path(file).resolve()
        if path.is_relative_to(root / "minimind") or path.is_relative_to(root / "stages"):
            found.append(_relative(path))
    return found


def _files(inputs: Iterable[Path]) -> Iterable[Path]:
    for path in inputs:
        if path.is_dir():
            yield from (_relative(file) for file in sorted(path.rglob("*")) if file.is_file())
        elif path.is_file():
            yield _relative(path)
        else:
            raise UserError(f"{path} is missing; run the stage that makes it: `dvc repro`.")


def _relative(path: Path) -> Path:
    """Relative to the working folder where possible: the same names in every clone."""
    path = Path(os.path.abspath(path))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
