"""The socket that the server listens on, opened before anything is loaded."""

from __future__ import annotations

import os
import socket

from pyserve.api.http import BACKLOG
from pyserve.errors import StartupError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises StartupError naming the port."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError:
        raise StartupError(f"--host {host} is not an address of this machine") from None
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno or 0)
        raise StartupError(
            f"cannot listen on {host} port {port}: {reason}; choose another with --port"
        ) from None
    return sock


def url(host: str, sock: socket.socket) -> str:
    port = sock.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
