"""A stage's command in a process of its own, without its seconds of imports.

The process is forked from this one, which has imported the libraries, and nothing of the project
where another copy of it is to run. Files, signals, output and exit code are those of
`python -m stages.<name>`.
"""

import errno
import io
import os
import runpy
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What stages import and this process does not need.
import numpy  # noqa: F401
import psutil  # noqa: F401
import pydantic_settings  # noqa: F401
import rich.progress  # noqa: F401
import safetensors.torch
import tokenizers  # noqa: F401
import torch
import torch._dynamo
import typer  # noqa: F401

torch.set_num_threads(1)


class StageProcess:
    """A started stage; `finish` reaps it."""

    def __init__(
        self,
        project: Path,
        command: str,
        log: Path,
        environment: dict[str, str],
        writes_before_full: int | None = None,
    ) -> None:
        """writes_before_full: how often the stage may write before its disk is full."""
        assert threading.active_count() == 1, "a fork would lose threads"
        python, flag, module, *arguments = shlex.split(command)
        assert (python, flag) == ("python", "-m")
        self.log = log
        self.started = time.time()
        self.exit_code: int | None = None
        log.write_bytes(b"")  # of the process before, if this one is killed at once
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(project, module, arguments, log, environment, writes_before_full)

    def is_running(self) -> bool:
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is None

    def send(self, number: int) -> None:
        if self.is_running():
            os.kill(self.pid, number)

    def finish(self) -> int:
        """Its exit code: of a process that a signal killed, minus the signal's number."""
        if self.exit_code is None:
            self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.exit_code

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")


def _become(
    project: Path,
    module: str,
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    writes_before_full: int | None,
) -> None:
    """Be the stage, in the forked process; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.environ.update(environment)
        os.chdir(project)
        sys.path[0] = str(project)
        sys.argv = [module, *arguments]
        if writes_before_full is not None:
            _fill_disk_after(writes_before_full)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fill_disk_after(num_writes: int) -> None:
    """From then on every write fails, as on a full disk."""
    left = num_writes

    def refuse(error: Callable[[], Exception]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error()

    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_safetensors() -> Exception:
        return safetensors.SafetensorError(f"Error while serializing: I/O error: {full()}")

    open_file, make_directory, sync, save_file = io.open, os.mkdir, os.fsync, None
    save_file = safetensors.torch.save_file

    def open_checked(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        # Not the compiled modules that Python writes as it imports: it does without them.
        if any(letter in mode for letter in "wax+"):
            refuse(full)
        return open_file(file, mode, *rest, **named)

    def mkdir_checked(*rest: Any, **named: Any) -> None:
        refuse(full)
        make_directory(*rest, **named)

    def fsync_checked(descriptor: int) -> None:
        refuse(full)
        sync(descriptor)

    def save_file_checked(*rest: Any, **named: Any) -> None:
        refuse(full_for_safetensors)
        save_file(*rest, **named)

    io.open = open_checked  # type: ignore[assignment]
    os.mkdir = mkdir_checked
    os.fsync = fsync_checked  # type: ignore[assignment]
    safetensors.torch.save_file = save_file_checked
