"""The HTTP protocol under the application: requests that never become one get our errors too."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiohttp import web

from pyserve.api.errors import error_response, log_unexpected
from pyserve.errors import InvalidRequestError
from pyserve.log import get_logger

BACKLOG = 2048  # connections that wait to be accepted
LINGERING_TIME_S = 2.0  # how long the rest of a refused body is read and dropped
TLS_HANDSHAKE_TIMEOUT_S = 10.0
LAST_FRAMES_S = 1.0  # for streams that the end of the engine cuts off to say so


class HttpProtocol(web.RequestHandler):
    """aiohttp's, but a request that cannot be parsed costs one log line and gets a JSON body."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called by aiohttp for broken HTTP (400) and for what the middleware let through."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun, no other can follow")
        if status == 400:
            get_logger().debug("broken HTTP from %s", request.remote)
            response = error_response(InvalidRequestError("this is not a valid HTTP request"))
        else:
            response = error_response(log_unexpected(exc or RuntimeError("no exception")))
        response.headers["Server"] = "pyserve"
        response.force_close()
        return response


@asynccontextmanager
async def listening(
    app: web.Application, sock: socket.socket, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Serve `app` on a listening socket, TCP or Unix; at the end all connections are closed."""
    loop = asyncio.get_running_loop()
    # A client that leaves cancels its handler: that is what frees its sequences.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LAST_FRAMES_S)
    await runner.setup()
    assert runner.server is not None
    options: dict[str, Any] = {
        "access_log": None,
        "lingering_time": LINGERING_TIME_S,
        "auto_decompress": False,  # a compressed body is refused
    }
    factory = partial(HttpProtocol, runner.server, loop=loop, **options)
    listener = await loop.create_server(
        factory,
        sock=sock,
        backlog=BACKLOG,
        ssl=tls,
        ssl_handshake_timeout=None if tls is None else TLS_HANDSHAKE_TIMEOUT_S,
    )
    try:
        yield
    finally:
        listener.close()
        await runner.cleanup()
