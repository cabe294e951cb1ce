"""Starting a stage again under torchrun, as many processes; its command stays the same.

The process that DVC started becomes torchrun itself. It passes signals on, waits until all have
ended, and prints one message: that of the process that failed first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# Where the processes of this machine leave their last words for the launcher.
_LAST_WORDS = "MINIMIND_LAST_WORDS"
# torchrun kills who has not ended so long after a signal; saving a large state takes a while.
SHUTDOWN_SECONDS = 600


class Kind(IntEnum):
    """Of last words; of several the launcher prints the first of the lowest kind."""

    MESSAGE = 0  # for a person
    DEATH = 1  # of a process that could say nothing
    BUG = 2  # or a process whose peer is gone: it fails in the same way


def is_worker() -> bool:
    """Whether torchrun or a cluster has started this process, be it by our doing or a person's."""
    return "RANK" in os.environ


def other_machines() -> bool:
    """Whether torchrun's own variable says that there are more machines than this one."""
    return os.environ.get("PET_NNODES", "1") not in ("1", "1:1")


def launch(stage: str, num_processes: int) -> int:
    """Run this process's own command `num_processes` times, and return the exit code.

    torchrun's variables (PET_NNODES, PET_RDZV_ENDPOINT and so on) are heard: with them, the same
    command on several machines makes one group of processes of them all.

    Raises:
        UserError: torchrun's variables are wrong, or the other machines cannot be found.
    """
    # Imported here: only a stage of many processes needs it.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser, run

    logging.disable(logging.CRITICAL)  # torchrun tells at length what we tell in a line
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # To be passed on: its own, and those of Slurm.
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", signals)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what we want of it
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    with tempfile.TemporaryDirectory(prefix="minimind-") as last_words:
        os.environ[_LAST_WORDS] = last_words
        code = 0
        try:
            spec = sys.modules["__main__"].__spec__
            command = ["-m", spec.name, *sys.argv[1:]] if spec else sys.argv
            options = ["--nproc-per-node", str(num_processes), "--log-dir", last_words]
            run(get_args_parser().parse_args([*options, *command]))
        except SignalException as stopped:
            code = 128 + int(stopped.sigval)
        except ChildFailedError as error:
            code = max(1, error.get_first_failure()[1].exitcode)
            _note_deaths(error, Path(last_words))
        except (RendezvousError, ValueError, AssertionError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"torchrun cannot start (see its variables PET_*): {reason}") from None
        said = [json.loads(f.read_text(encoding="utf-8")) for f in Path(last_words).glob("*.json")]
        if said:
            first = min(said, key=lambda words: (words["kind"], words["time"]))
            print(first["words"].rstrip(), file=sys.stderr)
        elif code:
            print(f"{stage}: a process ended with exit code {code}", file=sys.stderr)
    return code


def say_last_words(words: str, kind: Kind = Kind.MESSAGE) -> bool:
    """Leave a message for the launcher; False if there is none, and one has to print oneself."""
    directory = os.environ.get(_LAST_WORDS)
    if not is_worker() or not directory or not Path(directory).is_dir():
        return False
    _write_words(Path(directory), int(os.environ["RANK"]), words, kind, time.time())
    return True


def _note_deaths(error: ChildFailedError, directory: Path) -> None:
    """Last words for those who could not say any: killed, by the system when memory runs out."""
    for rank, failure in error.failures.items():
        number = -failure.exitcode
        if number > 0 and number not in (signal.SIGTERM, signal.SIGINT):
            name = signal.Signals(number).name
            hint = "; was there too little memory?" if number == signal.SIGKILL else ""
            _write_words(directory, rank, f"process {rank} was killed by {name}{hint}", Kind.DEATH)


def _write_words(directory: Path, rank: int, words: str, kind: Kind, when: float = 0.0) -> None:
    contents = json.dumps({"kind": kind, "time": when, "rank": rank, "words": words})
    (directory / f"{rank}-{kind}.json").write_text(contents, encoding="utf-8")
