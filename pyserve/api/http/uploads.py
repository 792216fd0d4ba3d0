"""Uploads: reads request bodies. Limits the size and time of each, and the memory of all together.

Bytes are counted as they arrive, not when Content-Length announces them, so a client that
announces much and sends nothing takes no room from others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from pyserve.api.http import bounds
from pyserve.api.http.budget import ByteBudget
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.http.keys import CLIENT
from pyserve.errors import (
    BodyTooLargeError,
    BodyTooLateError,
    InvalidRequestError,
    TooManyBytesError,
    UnavailableError,
)

NUM_BODY_BYTES = web.RequestKey("num_body_bytes", int)  # set once the body has been read


class Uploads:
    """The request bodies of one server. All methods run on the event loop."""

    def __init__(self) -> None:
        self._budget = ByteBudget(bounds.MAX_UPLOAD_BYTES, bounds.MAX_CLIENT_UPLOAD_BYTES)
        self._reading: set[asyncio.Task[bytes]] = set()
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        """Counted bytes of all bodies that are in memory."""
        return self._budget.num_bytes

    @asynccontextmanager
    async def read(self, request: web.Request, *, max_bytes: int) -> AsyncIterator[bytes]:
        """Read the body of `request`, at most `max_bytes`; it is counted until the context ends.

        Raises a RequestError where the body is too large, too late, cut off or badly encoded, where
        there is no room for it, or where the server shuts down.
        """
        announced = request.content_length or 0
        if announced > max_bytes:
            raise _too_large(max_bytes)
        counted = _Counted(self._budget, request[CLIENT])
        counted.check(announced)
        try:
            if request.content.is_eof():
                body = await _read(request, counted, max_bytes)
            else:
                body = await self._wait(request, counted, max_bytes)
            request[NUM_BODY_BYTES] = len(body)
            yield body
        except web.RequestPayloadError:
            raise _cut_off() from None
        finally:
            counted.release()

    def close(self) -> None:
        """Shut down: stop waiting for bodies that have not arrived, and refuse further ones."""
        self._is_closed = True
        for reading in self._reading:
            reading.cancel()

    async def _wait(self, request: web.Request, counted: _Counted, max_bytes: int) -> bytes:
        connection = connection_of(request)
        if connection.has_ended:
            raise _cut_off()
        if self._is_closed:
            raise _shutting_down()
        reading = asyncio.ensure_future(_read(request, counted, max_bytes))
        # If this task is cancelled in the turn in which `reading` fails, nobody else retrieves the
        # exception, and asyncio would log it.
        reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._reading.add(reading)
        try:
            with connection.receiving():
                await asyncio.wait([reading], timeout=bounds.BODY_TIMEOUT_S)
            if reading.done() and not reading.cancelled():
                return reading.result()
        finally:
            self._reading.discard(reading)
            reading.cancel()
        if self._is_closed:
            raise _shutting_down()
        raise BodyTooLateError(f"the body has not arrived in {bounds.BODY_TIMEOUT_S:.0f} s")


class _Counted:
    """Counts one body in the budget, except for its first SMALL_BODY_BYTES."""

    def __init__(self, budget: ByteBudget, client: str) -> None:
        self._budget = budget
        self._client = client
        self._num_bytes = 0

    def check(self, size: int) -> None:
        """Raise TooManyBytesError where there is no room for a body of `size` bytes in all."""
        more = max(size - bounds.SMALL_BODY_BYTES, 0) - self._num_bytes
        if more > 0 and not self._budget.has_room(self._client, more):
            raise TooManyBytesError(
                f"{self._budget.num_bytes} bytes of request bodies are in memory, of "
                f"{self._budget.max_bytes} that may be and {self._budget.max_client_bytes} of one "
                f"client: there is no room for {more} more",
                bounds.UPLOAD_RETRY_S,
            )

    def grow(self, size: int) -> None:
        """Count the body up to `size` bytes, which have arrived in all. Raises as `check` does."""
        self.check(size)
        more = max(size - bounds.SMALL_BODY_BYTES, 0) - self._num_bytes
        self._budget.add(self._client, more)
        self._num_bytes += more

    def release(self) -> None:
        self._budget.add(self._client, -self._num_bytes)
        self._num_bytes = 0


async def _read(request: web.Request, counted: _Counted, max_bytes: int) -> bytes:
    # request.read() would keep the body for as long as the request lives, maybe an hour of
    # streaming.
    body = bytearray()
    while piece := await request.content.readany():
        size = len(body) + len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        counted.grow(size)
        body += piece
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {max_bytes} bytes")


def _cut_off() -> InvalidRequestError:
    return InvalidRequestError("the body is cut off or badly encoded")


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down")
