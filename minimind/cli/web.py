"""`minimind web`: talk to checkpoints in a browser."""

import os
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Annotated

import typer

from minimind.cli.ports import listen
from minimind.errors import UserError


def web(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CHECKPOINT...]", help="as for `minimind chat`; by default all that are here"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to serve at; others than this machine's need a password")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
) -> None:
    """Serve a page to talk to checkpoints, side by side; Ctrl-C ends it.

    MINIMIND_PASSWORD is asked for, with the user `minimind`, where it is set.
    """
    if find_spec("gradio") is None:
        raise UserError("gradio is missing; pip install 'minimind-dvc[web]'.")
    password = os.environ.get("MINIMIND_PASSWORD")
    if not password and not _is_this_machines(host):
        raise UserError(
            f"--host is {host}: others could talk to the models; set MINIMIND_PASSWORD, or "
            "serve at 127.0.0.1."
        )
    # Imported here: PyTorch takes seconds to load.
    from minimind.compute.device import prepare_device
    from minimind.compute.settings import load_settings
    from minimind.talk.about import about
    from minimind.talk.speaker import Speaker, known_checkpoints, open_speaker
    from minimind.talk.web import MOST_COLUMNS, page, serve

    if len(checkpoints or ()) > MOST_COLUMNS:
        raise UserError(f"{len(checkpoints or ())} checkpoints; at most {MOST_COLUMNS} fit.")
    names = checkpoints or known_checkpoints()
    if not names:
        raise UserError("models/ has no checkpoint; name one, or `minimind repro` makes some.")
    listen(host, port).close()  # Gradio would say it in words of its own, after it began
    device = prepare_device(load_settings())
    speakers = {name: open_speaker(name, device) for name in checkpoints or ()}

    def opened(name: str) -> Speaker:
        return speakers.get(name) or open_speaker(name, device)

    blocks = page(names, len(checkpoints or [1]), opened, about)
    typer.echo(f"http://{host}:{port}; Ctrl-C ends.")
    serve(blocks, host, port, password)


def _is_this_machines(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
