"""The HTTP protocol under the application: requests that never become one get our errors too.

What a connection may cost before there is a request is bounded here: the time and the bytes of a
head. Its place among the others is in connections.py, its bounds are in bounds.py.
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

LAST_FRAMES_S = 1.0  # for streams that the end of the engine cuts off to say so
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # may come any number of times before an answer
_PYTHON_PARSER = (
    "aiohttp has no C parser here and reads HTTP in Python: slower, and request smuggling was "
    "possible through that parser before 3.14.4. Unset AIOHTTP_NO_EXTENSIONS, or: "
    "pip install --force-reinstall --only-binary aiohttp aiohttp"
)


class HttpProtocol(web.RequestHandler):
    """aiohttp's, but a request that cannot be parsed costs one log line and gets a JSON body.

    A head that is too large is refused, one that is too slow ends its connection. A client that
    ends its side is answered what it has asked. aiohttp has no public way to some of it: _messages,
    _waiter, _close, _force_close and _ErrInfo are its own, which is why pyproject.toml bounds it.

    request    the one that is being answered, from its handler on until its answer is written.
    on_probe   says something to the client in the answer that is under way; None: nothing can be.
    has_asked  a request has come, answered or not.
    has_ended  the client sends nothing more, and waits for its answers or is gone.
    inner_user whom the server asks itself for: see inner.py; None: it is a client's connection.
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
        self._connection: asyncio.Transport | None = None  # also when aiohttp has let go of it
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._is_refused = False
        self._was_probed = False
        self._is_receiving = False  # a body
        self._slow_since_s = math.inf  # a body is read, or what is written is not taken

    # -- as a row of connections.py ----------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        is_waiting = self._waiter is not None and not self._waiter.done()
        return self._connection is None or (is_waiting and not self._messages)

    @property
    def is_unheard(self) -> bool:
        connection = self._connection
        if connection is None or connection.is_closing() or self.is_idle:
            return False
        # A body that comes faster than it is read stops the reading too, and for a moment.
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
            return False  # nothing to say, or what is unsent says it
        if self.on_probe is not None:
            self.on_probe()
        elif not request.writer.output_size:
            if request.version >= HttpVersion11:
                self._connection.write(CONTINUE)
            elif not is_first:
                self._connections.cut(self)  # it knows of nothing that comes before an answer
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

    # -- as asyncio's ------------------------------------------------------------------------------

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
        # What broke is in cycles with its error: the bodies behind would stay for the collector.
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
        """The client has ended its side or is gone. Both look the same; probes find out which."""
        is_gone = self.inner_user is not None  # the server never ends one side alone
        if is_gone or self.is_tls or self.is_idle or self._is_receiving:
            return False  # closes the connection
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
            # Nothing is asked or answered on this connection: this is a part of a head.
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
        """Answer `after` requests of those that have come, then with `error`; read no more."""
        self._is_refused = True
        while len(self._messages) > after:
            self._messages.pop()
        self._messages.append((_ErrInfo(status=400, exc=error, message=""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- as aiohttp's ------------------------------------------------------------------------------

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Write what the handler has left to be written."""
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self.request = None
            self._was_probed = False
            self._connections.touch(self)
            if self.num_unsent_bytes:
                self._connections.stall(self)
            if self.has_ended and not self._messages:
                self.force_close()  # what is written still leaves

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """A body is read: the client keeps the server waiting meanwhile."""
        self._is_receiving, self._slow_since_s = True, time.monotonic()
        try:
            yield
        finally:
            self._is_receiving, self._slow_since_s = False, math.inf

    def unread(self, num_bytes: int) -> AbstractContextManager[None]:
        """Count an answer of `num_bytes` while it is written; raises TooManyBytesError."""
        return self._connections.unread(self, num_bytes)

    def check_unread(self, num_bytes: int) -> None:
        """Raise TooManyBytesError where there is no room for an answer of `num_bytes` now."""
        self._connections.check_unread(self, num_bytes)

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


def connection_of(request: web.BaseRequest) -> HttpProtocol:
    """What `request` came on."""
    protocol = request.protocol
    assert isinstance(protocol, HttpProtocol)
    return protocol


class Serving(NamedTuple):
    """An application that is served: its connections, and what makes one more."""

    connections: Connections
    make_protocol: Callable[[], HttpProtocol]


@asynccontextmanager
async def listening(
    app: web.Application, sock: socket.socket | None, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Serving]:
    """Serve `app` on a listening socket, TCP or Unix, or only to itself where that is None.

    At the end all connections are closed.
    """
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        get_logger().warning(_PYTHON_PARSER)
    # A client that leaves cancels its handler: that is what frees its sequences.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=LAST_FRAMES_S)
    await runner.setup()
    assert runner.server is not None
    options: dict[str, Any] = {
        "access_log": None,
        "lingering_time": bounds.LINGERING_TIME_S,
        "auto_decompress": False,  # a compressed body is refused
        "keepalive_timeout": bounds.KEEP_ALIVE_S,
        "max_line_size": bounds.MAX_FIELD_BYTES,
        "max_field_size": bounds.MAX_FIELD_BYTES,
        "tcp_keepalive": False,  # acceptor.py sets it, once
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
    """Why a request that can be parsed is not taken; None: it is."""
    if isinstance(message, _ErrInfo):
        return None
    num_bytes = len(message.path)
    num_bytes += sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
    if num_bytes > bounds.MAX_HEAD_BYTES:
        return _head_too_large()
    if message.version not in (HttpVersion10, HttpVersion11):  # aiohttp would answer in the same
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
