"""`minimind plan`: what `dvc repro` would do, before anything runs."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from minimind.cli.presets import apply_preset, read_preset
from minimind.errors import UserError

PARAMS = Path("params.yaml")


def plan(
    targets: Annotated[
        list[str] | None, typer.Argument(help="stages; what they need is planned, too")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set-param", "-S", help="as of `dvc exp run`")
    ] = None,
    preset: Annotated[str, typer.Option(help="plan with a preset's values")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say which stages would run and why, and what that takes; nothing is run or changed."""
    # Imported here: other commands need no DVC.
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    from minimind.orchestrate.graph import load_graph
    from minimind.orchestrate.plan import EditedFiles
    from minimind.orchestrate.plan import plan as plan_stages

    try:
        with edited_params(preset, overrides or []) as edited:
            repo = Repo(
                ".", fs=EditedFiles({path: file.read_text() for path, file in edited.items()})
            )
            planned = [*plan_stages(repo, load_graph(repo, targets or []))]
    except DvcException as error:
        raise UserError(f"{error}; correct it.") from None
    if as_json:
        typer.echo(json.dumps({"stages": [vars(p) for p in planned]}, indent=1))


@contextmanager
def edited_params(preset: str, overrides: Sequence[str]) -> Iterator[dict[Path, Path]]:
    """Copies of params files with other values, by the file that each stands for.

    preset: a name, or nothing.
    overrides: as of `dvc exp run -S`: `reason.lr=1e-3`, `other.yaml:key=1`.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides

    by_file = to_path_overrides(overrides)
    with TemporaryDirectory() as folder:
        edited = {}
        for number, name in enumerate({str(PARAMS), *by_file}):
            edited[Path(name)] = copy = Path(folder, f"{number}-{Path(name).name}")
            copyfile(name, copy)
            if preset and name == str(PARAMS):
                apply_preset(copy, read_preset(Path("presets"), preset))
            try:
                apply_overrides(copy, by_file.get(name, []))
            except DvcException as error:
                raise UserError(
                    f"-S {' '.join(by_file[name])}: {error.__cause__ or error}"
                ) from None
        yield edited
