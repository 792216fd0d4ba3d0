"""HttpProtocol: aiohttp's HTTP protocol with our error bodies and limits.

Requests that cannot be parsed never reach the application, so they get their JSON errors here. The
time and size of a request's headers are limited here, with the limits of bounds.py; connections.py
limits the connections.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, NamedTuple

from aiohttp import EMPTY_PAYLOAD, HttpVersion10, HttpVersion11, http_parser, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import _ErrInfo

from pyserve.api.http import bounds, request_id
from pyserve.api.http.acceptor import Acceptor
from pyserve.api.http.connections import Connections
from pyserve.api.http.errors import error_response, log_unexpected
from pyserve.api.http.keys import network
from pyserve.errors import InvalidRequestError, RequestError
from pyserve.log import get_logger

LAST_FRAMES_S = 1.0  # time in which streams that the engine's end cuts off may send their error
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # may be sent any number of times before a response
_PYTHON_PARSER = (
    "aiohttp has no C parser here and reads HTTP in Python: slower, and request smuggling was "
    "possible through that parser before 3.14.4. Unset AIOHTTP_NO_EXTENSIONS, or: "
    "pip install --force-reinstall --only-binary aiohttp aiohttp"
)


class HttpProtocol(web.RequestHandler):
    """One connection. It differs from aiohttp's RequestHandler in these ways:

    A request that cannot be parsed costs one log line and gets a JSON body. Headers that are too
    large are refused; headers that arrive too slowly end the connection. A client that has shut
    down its sending side still gets its responses. Some of this uses private parts of aiohttp
    (_messages, _waiter, _close, _force_close, _ErrInfo), so pyproject.toml limits its version.

    client      the client's address, as keys.network gives it; "" where it has none.
    opening     task that ends when the connection is open, its TLS handshake included.
    request     the request being answered, from the start of its handler until its response is
                written.
    on_probe    has something written to the running response, to probe the client; None: the
                response is not a stream.
    has_asked   at least one request has arrived, answered or not.
    has_ended   the client sends nothing more: it waits for its responses, or has gone.
    inner_user  the user for whom the server calls itself (inner.py); None: a client's connection.
    """

    __slots__ = (
        "_connection", "_connections", "_head_timer", "_is_receiving", "_is_refused",
        "_num_head_bytes", "_slow_since_s", "_was_probed", "client", "has_asked", "has_ended",
        "inner_user", "on_probe", "opening", "request",
    )  # fmt: skip

    def __init__(self, manager: web.Server, *, connections: Connections, **options: Any) -> None:
        super().__init__(manager, **options)
        self.client = ""
        self.opening: asyncio.Task[None] | None = None
        self.request: web.BaseRequest | None = None
        self.on_probe: Callable[[], None] | None = None
        self.has_ended = False
        self.has_asked = False
        self.inner_user: str | None = None
        self._connections = connections
        self._connection: asyncio.Transport | None = None  # kept longer than aiohttp's `transport`
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._is_refused = False
        self._was_probed = False
        self._is_receiving = False  # a body is being received
        self._slow_since_s = math.inf  # since when the client sends a body or does not read

    # -- connections.Connection --------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        is_waiting = self._waiter is not None and not self._waiter.done()
        return self._connection is None or (is_waiting and not self._messages)

    @property
    def is_unheard(self) -> bool:
        connection = self._connection
        if connection is None or connection.is_closing() or self.is_idle:
            return False
        # While a body is received, reading pauses briefly whenever it arrives faster than it is
        # consumed; that does not count.
        return self.has_ended or not (connection.is_reading() or self._is_receiving)

    @property
    def is_over(self) -> bool:
        return self.has_ended and self.is_idle

    @property
    def num_unsent_bytes(self) -> int:
        return 0 if self._connection is None else self._connection.get_write_buffer_size()

    @property
    def is_tls(self) -> bool:
        connection = self._connection
        return connection is not None and connection.get_extra_info("sslcontext") is not None

    def is_expendable(self, now_s: float) -> bool:
        return self.is_idle or now_s - self._slow_since_s > bounds.EXPENDABLE_S

    def fileno(self) -> int:
        assert self._connection is not None
        number: int = self._connection.get_extra_info("socket").fileno()
        return number

    def probe(self, now_s: float) -> bool:
        is_first, self._was_probed = not self._was_probed, True
        request = self.request
        if self._connection is None or request is None or self.num_unsent_bytes:
            return False  # nothing can be written, or the unsent bytes already serve as a probe
        if self.on_probe is not None:
            self.on_probe()
        elif not request.writer.output_size:
            if request.version >= HttpVersion11:
                self._connection.write(CONTINUE)
            elif not is_first:
                self._connections.cut(self)  # HTTP/1.0 has nothing to send before a response
        return is_first

    def cut(self) -> None:
        if self.opening is not None and not self.opening.done():
            self.opening.cancel()
        elif self._connection is not None:
            self._connection.abort()

    def finish(self) -> None:
        if self._connection is None:
            self.cut()
        else:
            self.force_close()

    # -- asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        transport.set_write_buffer_limits(bounds.WRITE_BUFFER_BYTES)
        self._connection = transport
        address = self.peername
        self.client = network(str(address[0])) if isinstance(address, tuple) else ""

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.remove(self)
        self._connection = None
        self._end_head()
        super().connection_lost(exc)
        # A failed request is in a reference cycle with its exception, so bodies that are queued
        # behind it would stay until the garbage collector runs.
        self._messages.clear()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._slow_since_s = time.monotonic()
        self._connections.stall(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._slow_since_s = math.inf
        self._connections.flow(self)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has shut down its sending side or has gone; only probes can tell which.

        Returns False to close the connection, True to keep it open for the responses.
        """
        is_gone = self.inner_user is not None  # our own client never shuts down one side alone
        if is_gone or self.is_tls or self.is_idle or self._is_receiving:
            return False
        self.has_ended = True
        self._connections.watch(self)
        return True

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        num_known = len(self._messages)
        super().data_received(data)
        if self._force_close or self._close:
            return
        if self.is_unheard:
            self._connections.watch(self)
        if len(self._messages) > num_known:
            self.has_asked = True
            self._connections.touch(self)
            self._end_head()
            for number, (message, _) in enumerate(list(self._messages)):
                refusal = _refusal(message) if number >= num_known else None
                if refusal is not None:
                    self._refuse(refusal, after=number)
                    return
        elif data and self._waiter is not None and not self._waiter.done():
            # aiohttp waits for a request and got no whole one: these are parts of its headers.
            self._num_head_bytes += len(data)
            if self._num_head_bytes > bounds.MAX_HEAD_BYTES:
                self._end_head()
                self._refuse(_head_too_large())
            elif self._head_timer is None:
                loop = asyncio.get_running_loop()
                self._head_timer = loop.call_later(bounds.HEAD_TIMEOUT_S, self.force_close)

    def _end_head(self) -> None:
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: RequestError, *, after: int = 0) -> None:
        """Answer the first `after` queued requests, then send `error`; ignore all further data."""
        self._is_refused = True
        while len(self._messages) > after:
            self._messages.pop()
        self._messages.append((_ErrInfo(status=400, exc=error, message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- aiohttp.web.RequestHandler ----------------------------------------------------------------

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write what the handler has not written itself. aiohttp calls this after each handler."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self.request = None
            self._was_probed = False
            self._connections.touch(self)
            if self.num_unsent_bytes:
                self._connections.stall(self)
            if self.has_ended and not self._messages:
                self.force_close()  # what is written is still sent

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """A context in which a request's body is received, so the server waits for the client."""
        self._is_receiving, self._slow_since_s = True, time.monotonic()
        try:
            yield
        finally:
            self._is_receiving, self._slow_since_s = False, math.inf

    def unread(self, num_bytes: int) -> AbstractContextManager[None]:
        """Count a response of `num_bytes` while the context lasts. Raises TooManyBytesError."""
        return self._connections.unread(self, num_bytes)

    def check_unread(self, num_bytes: int) -> None:
        """Raise TooManyBytesError where there is no room for a response of `num_bytes` now."""
        self._connections.check_unread(self, num_bytes)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called by aiohttp for broken HTTP (400) and for exceptions that no middleware caught."""
        if request.writer.output_size > 0:
            raise ConnectionError("the response has begun, no other can follow")
        if isinstance(exc, ConnectionError):
            raise exc  # the client has gone, so there is nobody to answer and no bug of ours
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


def connection_of(request: web.BaseRequest) -> HttpProtocol:
    """The connection that `request` arrived on."""
    protocol = request.protocol
    assert isinstance(protocol, HttpProtocol)
    return protocol


class Serving(NamedTuple):
    """A served application: its table of connections, and what makes the protocol of a new one."""

    connections: Connections
    make_protocol: Callable[[], HttpProtocol]


@asynccontextmanager
async def listening(
    app: web.Application, sock: socket.socket | None, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Serving]:
    """Serve `app` on a listening socket, TCP or Unix, until the context ends; then close all.

    Where `sock` is None, only the server itself can connect, through inner.py.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        get_logger().warning(_PYTHON_PARSER)
    # When a client disconnects, its handler is cancelled, which frees its sequences.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LAST_FRAMES_S)
    await runner.setup()
    assert runner.server is not None
    options: dict[str, Any] = {
        "access_log": None,
        "lingering_time": bounds.LINGERING_TIME_S,
        "auto_decompress": False,  # compressed bodies are refused
        "keepalive_timeout": bounds.KEEP_ALIVE_S,
        "max_line_size": bounds.MAX_FIELD_BYTES,
        "max_field_size": bounds.MAX_FIELD_BYTES,
        "tcp_keepalive": False,  # acceptor.py sets it once, on the listening socket
        "loop": asyncio.get_running_loop(),
    }
    connections = Connections(is_tls=tls is not None)
    make = partial(HttpProtocol, runner.server, connections=connections, **options)
    acceptor = None if sock is None else Acceptor(sock, connections, make, tls=tls)
    if acceptor is not None:
        acceptor.start()
    try:
        yield Serving(connections, make)
    finally:
        if acceptor is not None:
            acceptor.stop()
        await runner.cleanup()
        connections.close()


def _refusal(message: RawRequestMessage | _ErrInfo) -> RequestError | None:
    """Why a request that could be parsed is refused; None: it is accepted."""
    if isinstance(message, _ErrInfo):
        return None
    num_bytes = len(message.path)
    num_bytes += sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
    if num_bytes > bounds.MAX_HEAD_BYTES:
        return _head_too_large()
    # aiohttp would answer any other version with that version.
    if message.version not in (HttpVersion10, HttpVersion11):
        return InvalidRequestError("only HTTP/1.0 and HTTP/1.1 are spoken here")
    expectation = message.headers.get("Expect", "100-continue").strip().lower()
    if expectation != "100-continue":
        return InvalidRequestError("Expect may only be 100-continue")
    return None


def _head_too_large() -> RequestError:
    return InvalidRequestError(f"the headers are larger than {bounds.MAX_HEAD_BYTES} bytes")


def _head_error(error: BaseException | None) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, LineTooLong):
        return InvalidRequestError(
            f"the request line or a header is longer than {bounds.MAX_FIELD_BYTES} bytes"
        )
    return InvalidRequestError("this is not a valid HTTP request")
