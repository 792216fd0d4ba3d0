"""InnerClient: HTTP requests of the server to itself, for batches.

    InnerClient -> socket pair -> HttpProtocol -> the application, as if it came from the network

Nobody else can open such a connection, as it has no port and no file; so it needs no API key, and
the user that it names is trusted. Its requests are background requests: all others go first.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import cast

from pyserve.api.http import request_id
from pyserve.api.http.http_protocol import HttpProtocol
from pyserve.http_client import Connection, Endpoint, Reply

ENDPOINT = Endpoint("inner", 80)  # used only for the Host header


class InnerClient:
    """A connection of the server to itself for one user; it carries one request at a time."""

    def __init__(self, make_protocol: Callable[[], HttpProtocol], user: str) -> None:
        self._make_protocol = make_protocol
        self._user = user
        self._connection: Connection | None = None

    async def post(self, path: str, body: bytes, *, id: str) -> Reply:
        """POST `body` (JSON) to `path` with the request id `id`; returns the whole reply.

        There is no timeout. A failed request or reply does not raise: `error` and `status` of the
        reply tell of it. Cancelling ends the request. Raises OSError where no descriptor is left.
        """
        if self._connection is None or not self._connection.is_usable:
            self._connection = await self._open()
        headers = {request_id.HEADER: id}
        request = ENDPOINT.encode("POST", path, body, headers)
        return await self._connection.exchange(
            request, started_s=time.perf_counter(), timeout_s=None
        )

    def close(self) -> None:
        """Close the connection, which ends a request that runs on it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        protocol = self._make_protocol()
        protocol.inner_user = self._user
        try:
            await loop.connect_accepted_socket(lambda: cast(asyncio.BaseProtocol, protocol), theirs)
            return await Connection.over(ours)
        except BaseException:
            ours.close()
            theirs.close()
            raise


def client_of(user: str) -> str:
    """The client (keys.CLIENT) of a user's batches, separate from that of the user's own requests.

    So batches use up none of the limits that the user's other requests have.
    """
    return f"{user}\0batch"
