"""The project's repository: there is none, of DVC or git, or git's is empty, or DVC runs stages."""

import json
import os
import subprocess
from configparser import ConfigParser
from configparser import Error as ParserError
from contextlib import suppress
from pathlib import Path

import psutil

from minimind.errors import UserError
from minimind.lineage.dvc_files import output_paths, stages_as_written, variants
from minimind.lineage.dvc_process import writers

COMMIT = '`git init && git add -A && git commit -m "Start"`'


def said_by_dvc(error: Exception, advice: str = "correct it") -> UserError:
    """An error of DVC's as a line with what to do."""
    text = " ".join(f"{error}: {error.__cause__}".removesuffix(": None").split())
    if "not inside of a DVC repository" in text:
        return UserError("this is no DVC project; run from the project's root folder.")
    if "is not a git repository" in text:
        return UserError(f"{text}; run {COMMIT}, or to do without: `dvc config core.no_scm true`.")
    if "dvc.lock' validation failed" in text:
        advice = "`git checkout dvc.lock` brings it back"
    return UserError(f"{text.rstrip('.')}; {advice}.")


def fault_of_dvc(root: Path) -> str | None:
    """What has every command of DVC fail in a project; None if nothing does."""
    # At the top they would double the time of every command.
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.rwlock import SCHEMA
    from voluptuous import Invalid

    try:
        Repo(str(root)).close()
    except DvcException as error:
        return str(said_by_dvc(error)).rstrip(".")
    except OSError as error:
        return f"DVC cannot open the project: {error}; put that right, or move it away"
    file = root / ".dvc/tmp/rwlock"  # in which DVC keeps who reads and writes what
    try:
        if file.exists():
            SCHEMA(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, Invalid):
        return f"{file} is broken, so that every command of DVC fails; when none runs, remove it"
    return None


def lack_of_commits(root: Path) -> str:
    """What to say where git has no commit of a project; empty where it has."""
    with suppress(OSError):
        command = ["git", "rev-parse", "--quiet", "--verify", "HEAD"]
        if not subprocess.run(command, cwd=root, capture_output=True, check=False).returncode:
            return ""
    return f"git has no commit of this project, and so nothing to go back to; run {COMMIT} first."


def has_remote(root: Path) -> bool:
    """Whether the project's own config names a remote that DVC asks by default."""
    config = ConfigParser(strict=False, interpolation=None)
    with suppress(OSError, ValueError, ParserError):  # broken: DVC says so
        config.read([root / ".dvc/config", root / ".dvc/config.local"], "utf-8")
    return config.has_option("core", "remote")


def running_stages(root: Path) -> list[str]:
    """Stages whose outputs a living process of DVC writes."""
    written = {path for path, pid in writers(root).items() if psutil.pid_exists(pid)}
    stages = stages_as_written(root / "dvc.yaml") if written else {}
    found = []
    with suppress(AttributeError, KeyError, TypeError):  # it was edited meanwhile, and is wrong
        for name, stage, variant in variants(stages):
            paths = output_paths([*stage.get("outs", []), *stage.get("metrics", [])], variant)
            if written & {os.path.join(os.path.realpath(root), path) for path in paths}:
                found.append(name)
    return found
