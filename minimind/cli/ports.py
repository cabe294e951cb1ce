"""Addresses to serve at."""

import socket

from minimind.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: somebody else does, or this machine has no such address.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be served on: {error.strerror}; choose another --port or --host."
        ) from None
