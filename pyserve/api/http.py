"""The HTTP protocol under the application: requests that never become one get our errors too.

What a connection may cost before there is a request is bounded here: the time and the bytes of a
head, the time between requests, the number of connections. Bodies are bounded in body.py.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiohttp import EMPTY_PAYLOAD, HttpVersion10, HttpVersion11, http_parser, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import _ErrInfo

from pyserve.api import request_id
from pyserve.api.errors import error_response, log_unexpected
from pyserve.errors import InvalidRequestError, RequestError
from pyserve.log import get_logger

BACKLOG = 2048  # connections that wait to be accepted
LINGERING_TIME_S = 2.0  # how long the rest of a refused body is read and dropped
KEEP_ALIVE_S = 620.0  # between requests: longer than proxies keep theirs, 600 s the longest of them
HEAD_TIMEOUT_S = 20.0  # from the first byte of a request to the end of its headers
MAX_HEAD_BYTES = 16 * 1024  # request line and headers
MAX_FIELD_BYTES = 8190  # of them, one line
MAX_CONNECTIONS = 16384
NUM_OTHER_FILES = 128  # file descriptors that are not connections
LOG_INTERVAL_S = 10.0
TLS_HANDSHAKE_TIMEOUT_S = 10.0
LAST_FRAMES_S = 1.0  # for streams that the end of the engine cuts off to say so
_PYTHON_PARSER = (
    "aiohttp has no C parser here and reads HTTP in Python: slower, and request smuggling was "
    "possible through that parser before 3.14.4. Unset AIOHTTP_NO_EXTENSIONS, or: "
    "pip install --force-reinstall --only-binary aiohttp aiohttp"
)


class ConnectionLimit:
    """How many connections there may be: as many as there are file descriptors for."""

    def __init__(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_CONNECTIONS + NUM_OTHER_FILES
        if soft < wanted and (hard > soft or hard == resource.RLIM_INFINITY):
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.max = max(1, min(soft - NUM_OTHER_FILES, MAX_CONNECTIONS))
        self.num_open = 0
        self._may_log_at_s = 0.0

    def log(self) -> None:
        """Tell of a connection that was refused, now and then."""
        now = time.monotonic()
        if now >= self._may_log_at_s:
            self._may_log_at_s = now + LOG_INTERVAL_S
            get_logger().warning("%d connections are open: further ones are closed", self.max)


class HttpProtocol(web.RequestHandler):
    """aiohttp's, but a request that cannot be parsed costs one log line and gets a JSON body.

    A head that is too large is refused, one that is too slow ends its connection. aiohttp has no
    public way to either: _messages, _waiter, _close, _force_close and _ErrInfo are its own, which
    is why pyproject.toml bounds it.
    """

    __slots__ = ("_head_timer", "_is_refused", "_limit", "_num_head_bytes")

    def __init__(self, manager: web.Server, *, limit: ConnectionLimit, **options: Any) -> None:
        super().__init__(manager, **options)
        self._limit = limit
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._is_refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._limit.num_open += 1
        if self._limit.num_open > self._limit.max:
            self._limit.log()
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._limit.num_open -= 1
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        num_known = len(self._messages)
        super().data_received(data)
        if self._force_close or self._close:
            return
        if len(self._messages) > num_known:
            self._end_head()
            for number, (message, _) in enumerate(list(self._messages)):
                refusal = _refusal(message) if number >= num_known else None
                if refusal is not None:
                    self._refuse(refusal, after=number)
                    return
        elif data and self._waiter is not None and not self._waiter.done():
            # Nothing is asked or answered on this connection: this is a part of a head.
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._end_head()
                self._refuse(_head_too_large())
            elif self._head_timer is None:
                loop = asyncio.get_running_loop()
                self._head_timer = loop.call_later(HEAD_TIMEOUT_S, self.force_close)

    def _end_head(self) -> None:
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: RequestError, *, after: int = 0) -> None:
        """Answer `after` requests of those that have come, then with `error`; read no more."""
        self._is_refused = True
        while len(self._messages) > after:
            self._messages.pop()
        self._messages.append((_ErrInfo(status=400, exc=error, message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
        if isinstance(exc, ConnectionError):
            raise exc  # the client has gone: nobody is answered, and it is no bug of ours
        if status == 400:
            request_id.begin(request)
            get_logger().debug("broken HTTP from %s", request.remote)
            response = error_response(_head_error(exc))
        else:
            response = error_response(log_unexpected(exc or RuntimeError("no exception")))
        response.headers["Server"] = "pyserve"
        response.headers[request_id.HEADER] = request_id.current.get()
        response.force_close()
        return response


@asynccontextmanager
async def listening(
    app: web.Application, sock: socket.socket, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Serve `app` on a listening socket, TCP or Unix; at the end all connections are closed."""
    loop = asyncio.get_running_loop()
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        get_logger().warning(_PYTHON_PARSER)
    # A client that leaves cancels its handler: that is what frees its sequences.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LAST_FRAMES_S)
    await runner.setup()
    assert runner.server is not None
    options: dict[str, Any] = {
        "access_log": None,
        "lingering_time": LINGERING_TIME_S,
        "auto_decompress": False,  # a compressed body is refused
        "keepalive_timeout": KEEP_ALIVE_S,
        "max_line_size": MAX_FIELD_BYTES,
        "max_field_size": MAX_FIELD_BYTES,
    }
    factory = partial(HttpProtocol, runner.server, limit=ConnectionLimit(), loop=loop, **options)
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


def _refusal(message: RawRequestMessage | _ErrInfo) -> RequestError | None:
    """Why a request that can be parsed is not taken; None: it is."""
    if isinstance(message, _ErrInfo):
        return None
    if _head_bytes(message) > MAX_HEAD_BYTES:
        return _head_too_large()
    if message.version not in (HttpVersion10, HttpVersion11):  # aiohttp would answer in the same
        return InvalidRequestError("only HTTP/1.0 and HTTP/1.1 are spoken here")
    expectation = message.headers.get("Expect", "100-continue").strip().lower()
    if expectation != "100-continue":
        return InvalidRequestError("Expect may only be 100-continue")
    return None


def _head_too_large() -> RequestError:
    return InvalidRequestError(f"the headers are larger than {MAX_HEAD_BYTES} bytes")


def _head_bytes(message: RawRequestMessage) -> int:
    return len(message.path) + sum(
        len(name) + len(value) + 4 for name, value in message.raw_headers
    )


def _head_error(error: BaseException | None) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, LineTooLong):
        return InvalidRequestError(
            f"the request line or a header is longer than {MAX_FIELD_BYTES} bytes"
        )
    return InvalidRequestError("this is not a valid HTTP request")
