"""`minimind serve`: a checkpoint behind OpenAI's API."""

from pathlib import Path
from typing import Annotated

import typer

from minimind.cli.ports import listen


def serve(
    folder: Annotated[Path, typer.Argument(help="of a checkpoint or export: models/grpo")],
    host: Annotated[
        str, typer.Option(help="address to listen at; by default only this machine can ask")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="of answers, unless asked otherwise")
    ] = 1024,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="unless asked otherwise; 0: the likeliest token")
    ] = 0.0,
) -> None:
    """Answer /v1/chat/completions and /v1/models, as OpenAI's API does, until stopped."""
    # Imported here: PyTorch takes seconds to load.
    from minimind.compute.device import prepare_device
    from minimind.compute.settings import load_settings
    from minimind.serve.server import Server, run

    with listen(host, port) as listening:
        server = Server(folder, prepare_device(load_settings()), max_tokens, temperature)
        place = f"{host}:{listening.getsockname()[1]}"
        typer.echo(f"{server.name}: http://{place}/v1, until Ctrl-C")
        run(server, listening, [host, "localhost", "127.0.0.1"] if host != "0.0.0.0" else ["*"])
