"""What a stage's result was made from, pinned when the stage starts and checked before it saves.

DVC hashes dependencies after the command has run. Without this check, an edit made during a
run would be recorded as if it had made the weights.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minimind.errors import UserError
from minimind.params import Section, load_section
from minimind.runtime.code import was_edited

RUNTIME_PACKAGE = "minimind.runtime"  # decides how, not what; see its modules
# Where modules that decide a result are found; a stage that runs is called by the last of these.
TRACKED_PACKAGES = ("minimind", "stages", "__main__")


@dataclass(frozen=True)
class Pinned:
    """Content and change marks of one file."""

    sha256: str
    size: int
    inode: int
    modified_ns: int
    changed_ns: int
    links: int

    @classmethod
    def of(cls, path: Path) -> "Pinned":
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
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
        return linked and Pinned.of(path).sha256 == self.sha256


class Provenance:
    """Files a result depends on: inputs, and the project's own code that has been imported."""

    def __init__(self, inputs: Iterable[Path]) -> None:
        if edited := [str(path) for path in code_files() if was_edited(path)]:
            raise UserError(
                f"{', '.join(edited)} changed while the stage was starting: run `dvc repro` again."
            )
        self.files = {path: Pinned.of(path) for path in sorted({*code_files(), *_files(inputs)})}

    def digests(self) -> dict[str, str]:
        """sha256 by path."""
        return {str(path): pinned.sha256 for path, pinned in self.files.items()}

    def check(self) -> None:
        """Raises UserError when a file is not what it was at the start."""
        changed = [str(path) for path, pinned in self.files.items() if not pinned.still_holds(path)]
        if changed:
            raise UserError(
                f"{', '.join(changed)} changed while the stage was running; "
                "nothing was saved under false colours: run `dvc repro` again."
            )


@contextmanager
def unchanged(
    params: Path, sections: Mapping[str, Section], inputs: Iterable[Path]
) -> Iterator[None]:
    """Around the work of a stage that is too short for :func:`minimind.runtime.run.start_run`.

    Raises:
        UserError: code, inputs or sections of the params file were edited meanwhile.
    """
    provenance = Provenance(path for path in inputs if path.exists())  # the stage misses others
    yield
    provenance.check()
    check_sections(params, sections)


def check_sections(params: Path, sections: Mapping[str, Section]) -> None:
    """Raises UserError when a section of the params file is not what it was at the start."""
    for name, section in sections.items():
        if load_section(params, name, type(section)) != section:
            raise UserError(
                f"{params}: {name} changed while the stage was running; "
                "nothing was saved under false colours: run `dvc repro` again."
            )


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
