"""Writing responses: large ones go out in pieces, no faster than their clients read them.

Written all at once, a response would be copied into the transport's buffer, and stay there for as
long as the client likes. Its bytes are counted (connections.py) until it has been written.
"""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from pyserve.api.http.bounds import PIECE_BYTES
from pyserve.api.http.http_protocol import connection_of


async def deliver(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Write `response` if it is whole and larger than PIECE_BYTES; else leave that to aiohttp.

    Returns `response`. Raises TooManyBytesError, before any of it is written, where clients have
    not read too many bytes of other responses.
    """
    body = response.body if isinstance(response, web.Response) else None
    if not isinstance(body, bytes) or len(body) <= PIECE_BYTES or request.method == "HEAD":
        return response
    with connection_of(request).unread(len(body)):
        await response.prepare(request)
        await _write_pieces(request, response, body)
        await web.StreamResponse.write_eof(response)
    return response


async def write_large(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Write `data`, which is more than PIECE_BYTES, to a stream in pieces.

    Raises TooManyBytesError, before any of it is written, where there is no room for it.
    """
    with connection_of(request).unread(len(data)):
        await _write_pieces(request, response, data)


async def _write_pieces(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    view = memoryview(data)
    for start in range(0, len(data), PIECE_BYTES):
        await response.write(view[start : start + PIECE_BYTES])
        await request.writer.drain()
        # Let other tasks run: with a client that reads as fast as this writes, drain never waits.
        await asyncio.sleep(0)


def json_response(
    value: object, headers: dict[str, str] | None = None, *, status: int = 200
) -> web.Response:
    """A response with `value` encoded as JSON; bytes are taken to be JSON already."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
