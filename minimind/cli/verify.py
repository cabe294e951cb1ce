"""`minimind verify`: whether checkpoints are what dvc.lock says, back to the data."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from minimind.errors import UserError
from minimind.exports.receipt import RECEIPT, check_export, ggufs_of
from minimind.lineage.verify import Finding, Project

MARK = "# minimind verify --install-hook"


def verify(
    root: Annotated[
        Path, typer.Argument(help="the project's root folder, or an exported one, wherever it is")
    ] = Path("."),
    allow_older: Annotated[
        bool, typer.Option("--allow-older", help="what `dvc repro` would run again is no error")
    ] = False,
    staged: Annotated[
        bool, typer.Option("--staged", help="what git would commit, in place of what is here")
    ] = False,
    install_hook: Annotated[
        bool, typer.Option("--install-hook", help="have git check this before each commit")
    ] = False,
) -> None:
    """Check checkpoints against dvc.lock, and what they come of, back to the data.

    Of an exported folder: whether weights and files are what its receipt says.
    """
    if install_hook:
        typer.echo(f"{_install_hook(root)}: git checks what is staged before each commit.")
        return
    if not root.is_dir():
        raise UserError(f"{root} is no folder; name a project's or an exported one.")
    if (root / RECEIPT).exists():
        findings = list(check_export(root))
        if ggufs_of(root):
            from minimind.exports.gguf import check_ggufs  # needs an extra

            findings += check_ggufs(root)
    elif (root / "config.json").exists() and not (root / "dvc.lock").exists():
        raise UserError(
            f"{root / RECEIPT} is missing: only an exported folder tells by itself; what is in a "
            "project, `minimind verify` checks from its root folder."
        )
    else:
        findings = _findings_of_staged(root) if staged else list(Project(root).findings())
    for finding in findings:
        verdict = "" if finding.verdict == "whole" else f"{finding.verdict.upper()}: "
        typer.echo(f"{finding.subject}: {verdict}{finding.text}")
    if broken := [finding for finding in findings if finding.verdict == "broken"]:
        raise UserError(f"{len(broken)} of {len(findings)} broken; the first: {broken[0].text}.")
    older = [finding for finding in findings if finding.verdict == "out of date"]
    if older and not allow_older:
        raise UserError(
            f"{len(older)} of {len(findings)} out of date, and `dvc repro` runs them again; the "
            f"first: {older[0].text}."
        )


def _findings_of_staged(root: Path) -> list[Finding]:
    """Of what is in git's index; of what DVC keeps, and git does not, as it lies here.

    Git runs hooks at the top of the repository, and names there which index it commits.
    """
    with TemporaryDirectory() as folder:
        below = _git("rev-parse", "--show-prefix").strip()
        _git("checkout-index", "--all", f"--prefix={folder}/")
        copy = Path(folder, below, os.path.relpath(root))
        if (root / "dvc.lock").exists() and not (copy / "dvc.lock").exists():
            raise UserError("git would commit no dvc.lock; `git add dvc.lock` first.")
        try:
            return list(Project(root, copy).findings())
        except UserError as error:
            raise UserError(str(error).replace(f"{copy}/", "staged ")) from None


def _git(*arguments: str, folder: Path | None = None) -> str:
    """What git says; raises UserError with what it complains of, OSError where there is no git."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout


def _install_hook(root: Path) -> Path:
    """The git hook that was written.

    Raises:
        UserError: there is no project or git repository, or it has another such hook.
    """
    if not (root / "dvc.lock").is_file():
        raise UserError(f"{root / 'dvc.lock'} is missing; run from the project's root folder.")
    asked = ["rev-parse", "--git-path", "hooks/pre-commit", "--show-prefix"]
    try:
        said = _git(*asked, folder=root)
    except (OSError, UserError):
        raise UserError(f"{root} is in no git repository; run `git init` first.") from None
    path, below = said.splitlines()  # git runs hooks at the top of the repository
    hook = root / path
    command = f"{shlex.quote(sys.executable)} -m minimind.cli.main verify --staged --allow-older"
    command += f" {shlex.quote(below)}" if below else ""
    if hook.exists() and MARK.encode() not in hook.read_bytes():
        raise UserError(f"{hook} is there already; add this line to it: {command} || exit 1")
    hook.parent.mkdir(parents=True, exist_ok=True)
    hook.write_text(f"#!/bin/sh\n{MARK}\nexec {command}\n", encoding="utf-8")
    hook.chmod(0o755)
    return hook
