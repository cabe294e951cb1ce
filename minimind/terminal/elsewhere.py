"""A stage's command on another machine, through a template of the user's (MINIMIND_LAUNCHER).

DVC stays where the repository is, and the stage's process that it started stays beside it: that one
starts what the template says, hands signals on, and ends with its exit code.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from string import Formatter
from types import FrameType

from minimind.compute.settings import RuntimeSettings
from minimind.errors import UserError
from minimind.lineage.dvc_process import DVC_ELSEWHERE, our_dvc
from minimind.terminal.signals import catchable

LAUNCHERS = Path("launchers")
FIELDS = ("command", "stage", "log", "root")
# srun kills its tasks at once on SIGTERM and shows their state on SIGINT; this one it hands on.
STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)


def run_elsewhere(stage: str, settings: RuntimeSettings) -> int:
    """Run this process's own command as the template of `settings` says; the exit code.

    Raises:
        UserError: the template is wrong.
    """
    dvc, log = our_dvc(), settings.root / "runs" / "logs" / f"{stage.replace('@', '-')}.job.log"
    # Not every way to another machine takes the environment along.
    carried = settings.variables() | {
        "DVC_ROOT": os.path.relpath(settings.root),
        DVC_ELSEWHERE: f"{dvc[0]} {dvc[1]}" if dvc else "",
    }
    del carried["MINIMIND_LAUNCHER"]
    command = ["env", *(f"{name}={value}" for name, value in carried.items()), *sys.orig_argv]
    fields = {"command": command, "stage": [stage], "log": [str(log)], "root": [os.getcwd()]}
    words = filled(settings.launcher, fields)
    log.parent.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    wishes = 0

    def receive(number: int, _frame: FrameType | None) -> None:
        nonlocal wishes
        # One of each may come for a single wish, as in StopRequest.
        wishes += not received or number in received
        received.append(number)

    for number in catchable():
        signal.signal(number, receive)
    environment = {name: os.environ[name] for name in os.environ if name != "MINIMIND_LAUNCHER"}
    # In a session of its own Ctrl-C reaches it through us alone.
    process = subprocess.Popen(
        words, env=environment | carried, stdin=subprocess.DEVNULL, start_new_session=True
    )
    handed_on = 0
    while process.poll() is None:
        if handed_on < wishes:
            process.send_signal(STOP)
            handed_on += 1
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    # DVC would record the outputs of a stage that was asked to stop and ended with 0.
    return code or (128 + received[0] if received else 0)


def filled(template: str, fields: Mapping[str, Sequence[str]]) -> list[str]:
    """The words of a template with its fields filled in; no shell reads them.

    A word that is {command} becomes the command's words. In a word with more than that, as in
    `ssh gpu 'cd {root} && {command}'`, all fields are quoted: another machine's shell reads it.

    Raises:
        UserError: the template is wrong.
    """
    try:
        words = shlex.split(template)
        if words and not any("{command}" in word for word in words):
            file = LAUNCHERS / words[0]
            if not file.is_file():
                names = sorted(path.name for path in LAUNCHERS.glob("*") if not path.suffix)
                raise ValueError(
                    f"it has no {{command}}, and is no file in {LAUNCHERS}/ "
                    f"({', '.join(names) or 'there is none'})"
                )
            words = [str(file), "{stage}", "{log}", *words[1:], "--", "{command}"]
        return [part for word in words for part in _filled_word(word, fields)]
    except ValueError as error:
        raise UserError(
            f"MINIMIND_LAUNCHER is {template!r}: {error}; write a file's name, or a command such "
            "as srun --gres=gpu:1 {command}, with "
            f"{', '.join(f'{{{name}}}' for name in FIELDS)} as fields."
        ) from None


def _filled_word(word: str, fields: Mapping[str, Sequence[str]]) -> list[str]:
    if word == "{command}":
        return list(fields["command"])
    names = [name for _, name, _, _ in Formatter().parse(word) if name is not None]
    if unknown := [name for name in names if name not in fields]:
        raise ValueError(f"it has no field {{{unknown[0]}}}")
    for_a_shell = "command" in names
    return [
        word.format_map({n: shlex.join(ws) if for_a_shell else ws[0] for n, ws in fields.items()})
    ]
