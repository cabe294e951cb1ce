"""`minimind seeds`: queue the same experiment with other seeds."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from minimind.errors import UserError
from minimind.lineage.dvc_files import stages_as_written
from minimind.lineage.paths import quoted, refuse_lost
from minimind.lineage.repository import lack_of_commits
from minimind.params import read_params

PARAMS = Path("params.yaml")


def seeds(
    count: Annotated[int, typer.Argument(min=1, help="how many further seeds")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set-param", "-S", help="as of `dvc exp run`")
    ] = None,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="experiments at a time")] = 1,
    start: Annotated[bool, typer.Option("--start", help="start the queue, too")] = False,
) -> None:
    """Queue runs of HEAD that differ in nothing but the seed, for `minimind compare`.

    Seeds are counted up from that of params.yaml, past those that have run or are queued.
    """
    given = sorted(overrides or [])
    if any(re.match(r"[+~]*seed\b", override) for override in given):
        raise UserError("-S sets seed, which this command counts up; set it in params.yaml.")
    params = read_params(PARAMS)
    first = params.get("seed") if isinstance(params, dict) else None
    if not isinstance(first, int):
        raise UserError(f"{PARAMS}: seed is {first!r}; it must be a whole number.")
    if lack := lack_of_commits(Path()):
        raise UserError(lack)
    if changed := _git("status", "--porcelain", "--untracked-files=no").splitlines():
        raise UserError(
            f"{changed[0][3:]} {f'and {len(changed) - 1} more are' if changed[1:] else 'is'} not "
            "committed, and an experiment takes that along; commit or `git stash` first."
        )
    if untracked := _untracked():
        what = " and ".join(map(quoted, untracked))
        raise UserError(
            f"neither git nor DVC tracks {what}, and an experiment would not have that; run "
            f"`dvc add {' '.join(map(quoted, untracked))}`, and commit."
        )
    _refuse_values(given)
    if fixed := [key for key, values in params.items() if _own_seed(values) is not None]:
        typer.echo(f"{', '.join(fixed)}: its own seed stays; remove it to vary it, too.")
    there, seed = _names(), first
    commit = _git("rev-parse", "HEAD").strip()
    digest = hashlib.sha256(" ".join([commit, *given]).encode()).hexdigest()[:7]
    words = [word for word in re.split(r"[^\w=]+", " ".join(given)) if word]
    for _ in range(count):
        seed += 1
        while (name := "-".join(["seed", str(seed), *words, digest])) in there:
            typer.echo(f"{name}: there already")
            seed += 1
        options = [f"-S{override}" for override in [f"seed={seed}", *given]]
        _dvc("exp", "run", "--queue", "--name", name, *options)
        typer.echo(f"{name}: queued")
    if start:
        _dvc("queue", "start", "--jobs", str(jobs))
        typer.echo("Started; `dvc queue status` says how far it is. Then: minimind compare A B")
    else:
        typer.echo(f"Start them: dvc queue start -j {jobs}")


def _refuse_values(overrides: list[str]) -> None:
    """Raises UserError for values that a stage would refuse: a queued run would fail in silence."""
    from dvc.repo import Repo

    from minimind.cli.plan import edited_params
    from minimind.orchestrate.values import refuse_values

    with edited_params("", overrides) as edited, Repo() as repo:
        refuse_values(Path(), repo.index.stages, edited[PARAMS])
        refuse_lost(read_params(edited[PARAMS]), stages_as_written(Path("dvc.yaml")), PARAMS)


def _untracked() -> list[str]:
    """What stages read in the project that no stage makes and nobody tracks."""
    from dvc.repo import Repo

    with Repo() as repo:
        stages, root = list(repo.index.stages), Path(repo.root_dir)
        made = [Path(out.fs_path) for stage in stages for out in stage.outs]
        read = {Path(dep.fs_path) for stage in stages for dep in stage.deps}
        own = [
            path.relative_to(root).as_posix()
            for path in sorted(read)
            if path.is_relative_to(root)
            and path.exists()
            and not any(path.is_relative_to(out) or out.is_relative_to(path) for out in made)
        ]
    return [path for path in own if not _git("ls-files", "--", path)]


def _own_seed(section: object) -> object:
    return section.get("seed") if isinstance(section, dict) else None


def _names() -> set[str]:
    """Of experiments that have run, run, or wait to."""
    from dvc.repo import Repo

    with Repo() as repo:
        queue = repo.experiments.celery_queue
        entries = [*queue.iter_queued(), *queue.iter_active()]
        done = [name for of in repo.experiments.ls(all_commits=True).values() for name, _ in of]
        return {*done, *(entry.name for entry in entries)}


def _git(*arguments: str) -> str:
    return _run(["git", *arguments])


def _dvc(*arguments: str) -> str:
    return _run([sys.executable, "-m", "dvc", *arguments])


def _run(command: list[str]) -> str:
    """Raises UserError: it failed; the message is what it says."""
    with TemporaryFile("w+", encoding="utf-8") as output:
        # No pipe: the queue's worker would hold its end open for as long as it trains.
        done = subprocess.run(command, stdout=output, stderr=output, check=False)
        output.seek(0)
        printed = output.read()
    if done.returncode:
        lines = [line for line in printed.splitlines() if line.strip()] or ["it failed"]
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise UserError(f"{' '.join(command[-3:])}: {why.removeprefix('ERROR: ')}")
    return printed
