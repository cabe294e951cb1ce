"""One process at a time uses the checkpoints of a run, on whatever host it is.

A lock of the operating system is none between hosts on many shared disks, and on others outlives a
host that crashed. So the holder renews a file, `.resume/<stage>/<fingerprint>.lease`.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, LeaseSettingsMismatch, SoftFileLease, Timeout

from minimind.errors import UserError
from minimind.files import naming

LEASE_SECONDS = 60.0  # not renewed for so long: its holder is gone, or stopped, and has lost it
RENEWALS = 6  # in that time
POLL_SECONDS = 0.5


def hold(directory: Path, wait: Callable[[str], None] | None = None) -> SoftFileLease:
    """The folder of a run, made and leased, to be released; dead processes of this host have none.

    wait: called with who holds it, again and again until it is ours; what it raises ends that.

    Raises:
        UserError: somebody holds it, and there is no `wait`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(
        f"{directory}.lease",
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=LEASE_SECONDS / RENEWALS,
        thread_local=False,
    )
    turn = directory.parents[1] / "turn"
    while True:
        with suppress(Timeout, LeaseSettingsMismatch), FileLock(turn):
            turn.touch()  # by the clock of the disk, as renewals are: those of hosts differ
            with suppress(FileNotFoundError):
                renewed = Path(lease.lock_file).stat().st_mtime
                if turn.stat().st_mtime - renewed > LEASE_SECONDS:
                    lease.force_break()
            with naming(Path(lease.lock_file)):
                lease.acquire(timeout=0)
            directory.mkdir(exist_ok=True)
            (directory / "since").touch()
            return lease
        holder = _holder(lease, directory)
        if wait is None:
            raise UserError(f"{directory} is in use by {holder}; wait for it to end, or stop it.")
        wait(holder)
        time.sleep(POLL_SECONDS)


def refuse_if_lost(lease: SoftFileLease) -> None:
    """Raises UserError where another process has it now: ours was stopped for too long."""
    if lease.owner and lease.owner.token != lease.token:
        raise UserError(
            f"{Path(lease.lock_file).stem} was taken over by process {lease.owner.pid} on "
            f"{_host(lease.owner.hostname)}, since this one did not answer for over "
            f"{LEASE_SECONDS:.0f} s; run the same command again when that one has ended."
        )


def _holder(lease: SoftFileLease, directory: Path) -> str:
    owner = lease.owner
    who = f"process {owner.pid} on {_host(owner.hostname)}" if owner else "another process"
    with suppress(OSError):
        began = time.localtime((directory / "since").stat().st_mtime)
        return f"{who}, since {time.strftime('%Y-%m-%d %H:%M:%S', began)}"
    return who


def _host(name: str) -> str:
    return name.partition("?")[0]  # which containers have in common
