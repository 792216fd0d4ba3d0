"""Answers on their way out.

Large ones are written in pieces, as their clients take them, and counted meanwhile: written at once
they would be held again by the transport, for as long as the client likes.
"""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from pyserve.api.http.bounds import PIECE_BYTES
from pyserve.api.http.http_protocol import connection_of


async def deliver(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Write `response` where it is large and whole; anything else is left to aiohttp.

    Raises TooManyBytesError where too many answers are not taken, before any of it is written.
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
    """Write `data`, more than PIECE_BYTES, to a stream; one that has no room for it ends here."""
    with connection_of(request).unread(len(data)):
        await _write_pieces(request, response, data)


async def _write_pieces(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    view = memoryview(data)
    for start in range(0, len(data), PIECE_BYTES):
        await response.write(view[start : start + PIECE_BYTES])
        await request.writer.drain()
        # A client that reads as fast as this writes would have the loop for itself until the end.
        await asyncio.sleep(0)


def json_response(
    value: object, headers: dict[str, str] | None = None, *, status: int = 200
) -> web.Response:
    """`value` as JSON; bytes are JSON already."""
    body = value if isinstance(value, bytes) else msgspec.json.encode(value)
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
