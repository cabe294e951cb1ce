"""`minimind get`: data and models from Hugging Face or ModelScope."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def get(
    repository: Annotated[str, typer.Argument(help="owner/name on the hub")],
    files: Annotated[
        list[str] | None, typer.Argument(help="names or patterns; without: all that we can read")
    ] = None,
    rev: Annotated[
        str | None, typer.Option(help="a commit, tag or branch; a commit stays the same")
    ] = None,
    hub: Annotated[Literal["huggingface", "modelscope"], typer.Option()] = "huggingface",
    kind: Annotated[
        Literal["dataset", "model"] | None, typer.Option(help="where the hub has both")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="a folder; by default data/<the repository's name>")
    ] = None,
) -> None:
    """Bring files of a repository, check them by their hashes, and have DVC track them.

    Stopped, the same command goes on where it was.
    """
    # Imported here: DVC and the hub's library take as long to load as all else together.
    from minimind.project.hub import bring, find

    found = find(hub, repository, rev, kind)
    chosen = found.chosen(files or [])
    folder = output or Path("data", repository.rpartition("/")[2])
    size = sum(file.size for file in chosen)
    typer.echo(f"{found}: {len(chosen)} files, {size / 1e6:,.1f} MB, into {folder}")
    if left := [file.path for file in found.files if file not in chosen] if not files else []:
        typer.echo(
            f"left out, unless you name them: {', '.join(left[:8])}{' ...' * (len(left) > 8)}"
        )
    if rev is None:
        typer.echo(f"--rev {found.revision} brings the same again")
    brought, others = bring(found, chosen, folder)
    if others:
        typer.echo(f"beside them, from elsewhere or another revision: {', '.join(others)}")
    typer.echo(f"{len(brought)} new; commit {folder}.dvc: where each is from, and its SHA-256")
