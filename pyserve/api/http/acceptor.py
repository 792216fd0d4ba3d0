"""Acceptor: accepts a few connections per turn of the event loop and counts each before opening it.

asyncio's own servers accept up to a whole backlog in one turn, before any connection is counted.
Then a flood uses up all file descriptors, and every further accept costs a traceback and a timer.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from typing import cast

from pyserve.api.http import bounds
from pyserve.api.http.connections import Connection, Connections
from pyserve.log import get_logger


class Acceptor:
    """Accepts on one listening socket from `start` to `stop`; call both on the event loop."""

    def __init__(
        self,
        sock: socket.socket,
        connections: Connections,
        make_protocol: Callable[[], Connection],
        *,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._sock = sock
        self._connections = connections
        self._make_protocol = make_protocol
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        # Connections in their TLS handshake, by the task that opens them, the oldest first.
        self._opening: dict[asyncio.Task[None], Connection] = {}

    def start(self) -> None:
        self._sock.setblocking(False)
        if self._sock.family != socket.AF_UNIX:
            _ask_silent_machines(self._sock)
        self._sock.listen(bounds.BACKLOG)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def stop(self) -> None:
        """Close the listening socket, and connections whose TLS handshake is not finished."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for task in self._opening:
            task.cancel()

    def _accept(self) -> None:
        for _ in range(bounds.ACCEPTS_PER_TURN):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._wait(error)
                return
            if self._connections.make_place():
                self._open(sock)
            else:
                sock.close()

    def _wait(self, error: OSError) -> None:
        """Make room after a failed accept, and stop accepting for ACCEPT_PAUSE_S.

        The listening socket stays readable meanwhile, so the loop would call `_accept` at once.
        """
        self._connections.log(f"connections cannot be accepted: {os.strerror(error.errno or 0)}")
        for _ in range(bounds.ACCEPTS_PER_TURN):
            self._connections.cut_expendable()
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(
            bounds.ACCEPT_PAUSE_S, self._loop.add_reader, self._sock.fileno(), self._accept
        )

    def _open(self, sock: socket.socket) -> None:
        connection = self._make_protocol()
        self._connections.add(connection)
        task = self._loop.create_task(self._connect(sock, connection))
        connection.opening = task
        if self._tls is not None:
            self._opening[task] = connection
            if len(self._opening) > bounds.MAX_HANDSHAKES:
                self._connections.cut(self._opening.pop(next(iter(self._opening))))

        def opened(task: asyncio.Task[None]) -> None:
            self._opening.pop(task, None)
            error = None if task.cancelled() else task.exception()
            if task.cancelled() or error is not None:
                self._connections.remove(connection)
                sock.close()
            if error is not None and not isinstance(error, OSError):  # SSLError is one
                get_logger().error("a connection could not be opened", exc_info=error)

        task.add_done_callback(opened)

    async def _connect(self, sock: socket.socket, connection: Connection) -> None:
        sock.setblocking(False)
        await self._loop.connect_accepted_socket(
            lambda: cast(asyncio.BaseProtocol, connection),
            sock,
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else bounds.TLS_HANDSHAKE_TIMEOUT_S,
        )


def _ask_silent_machines(sock: socket.socket) -> None:
    """Enable TCP keep-alive, which detects clients whose machine is gone.

    Accepted sockets inherit these options from the listening socket.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, bounds.TCP_KEEP_ALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, bounds.TCP_KEEP_ALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, bounds.NUM_TCP_KEEP_ALIVES)
