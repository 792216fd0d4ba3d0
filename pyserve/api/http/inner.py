"""Requests of the server to itself: batches take the road that clients' requests take.

    InnerClient -> socket pair -> HttpProtocol -> the application, as if it came from the network

No port, no file and no key: nobody else can have such a connection, so its user is believed. What
comes on it is background: it gives way to all other requests.
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

ENDPOINT = Endpoint("inner", 80)  # for the Host header alone


class InnerClient:
    """One user's connection of the server to itself; at most one request at a time."""

    def __init__(self, make_protocol: Callable[[], HttpProtocol], user: str) -> None:
        self._make_protocol = make_protocol
        self._user = user
        self._connection: Connection | None = None

    async def post(self, path: str, body: bytes, *, id: str) -> Reply:
        """The whole answer to a request with a body of JSON and this id, however long it takes.

        Never raises what is wrong with either: `error` and `status` of the reply say so. Cancelling
        ends the request. OSError where there are no descriptors left.
        """
        if self._connection is None or not self._connection.is_usable:
            self._connection = await self._open()
        headers = {request_id.HEADER: id}
        request = ENDPOINT.encode("POST", path, body, headers)
        return await self._connection.exchange(
            request, started_s=time.perf_counter(), timeout_s=None
        )

    def close(self) -> None:
        """Close the connection, and end the request on it, if there is one."""
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
    """Between whom the server is shared: a user's batches take nothing from the user's requests."""
    return f"{user}\0batch"
