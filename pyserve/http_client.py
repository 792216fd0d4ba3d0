"""A small HTTP/1.1 and SSE client that uses little CPU beside the server that it talks to.

A `Connection` carries one exchange at a time and is kept alive between exchanges. Bytes are parsed
as they arrive (asyncio.Protocol), so no task runs per frame. Every exchange ends in a `Reply`, with
its `error` set if it failed; exchanges do not raise.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import msgspec

MAX_HEAD_BYTES = 64 * 1024
_ERROR_TEXT_CHARS = 300


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class Message(msgspec.Struct):
    """A chat delta or a whole chat message. Servers use one of two names for its reasoning."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: Message | None = None
    message: Message | None = None
    finish_reason: str | None = None


class Body(msgspec.Struct):
    """A streamed frame or a whole response, with the fields that are used here."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode_body = msgspec.json.Decoder(Body).decode


@dataclass(slots=True)
class Reply:
    """All that is known about one exchange. Times are in `time.perf_counter` seconds.

    status         HTTP status; 0: there was no response.
    chunk_times    arrival of each frame that can carry tokens, so not of chat's role frame and the
                   usage frame. A frame may hold several tokens; see `num_output_tokens`.
    chunk_counts   completion tokens of the choice so far, at each frame of chunk_times that brought
                   its usage: every one where continuous_usage_stats was asked for and is known to
                   the server, else none, or only some.
    finish_reasons, texts
                   choice index -> finish reason, and text where the connection keeps it.
    body           the body, unless it is a stream.
    is_done        a stream has ended with [DONE], or a whole body has arrived.
    is_unanswered  the server closed the connection without sending a byte.
    error          what went wrong; None: nothing.
    retry_after_s  seconds in the Retry-After header; None: there was none.
    """

    started_s: float
    status: int = 0
    ended_s: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    chunk_counts: list[int] = field(default_factory=list)
    usage: Usage | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    body: bytes = b""
    is_done: bool = False
    is_unanswered: bool = False
    error: str | None = None
    retry_after_s: int | None = None

    @property
    def num_output_tokens(self) -> int:
        """Output tokens by `usage`; without that the number of frames, which is a lower bound."""
        return self.usage.completion_tokens if self.usage else len(self.chunk_times)

    @property
    def num_cached_tokens(self) -> int:
        details = self.usage.prompt_tokens_details if self.usage else None
        return (details.cached_tokens or 0) if details else 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a server, and the API key that every request carries."""

    host: str
    port: int
    prefix: str = ""  # path before /v1
    is_tls: bool = False
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Endpoint:
        """Parse http(s)://host[:port][/prefix][/v1]. Raises ValueError."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) address: {url}")
        is_tls = parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port, prefix, is_tls, api_key)

    def encode(
        self, method: str, path: str, body: dict[str, Any] | bytes | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> bytes:  # fmt: skip
        """The bytes of one HTTP request; a body of bytes is JSON already."""
        payload = body if isinstance(body, bytes) else b""
        if isinstance(body, dict):
            payload = msgspec.json.encode(body)
        host = f"[{self.host}]" if ":" in self.host else self.host  # an address of IPv6
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}"]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + payload


class Connection(asyncio.Protocol):
    """One connection, with at most one exchange in flight.

    has_text    collect the text of streamed choices in Reply.texts.
    on_choices  called with the choices of each frame of a stream.
    """

    def __init__(
        self, *, has_text: bool, on_choices: Callable[[list[Choice]], None] | None = None
    ) -> None:
        self._has_text = has_text
        self._on_choices = on_choices
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._finished: asyncio.Future[None] | None = None
        self._reset_parser()

    @classmethod
    async def open(
        cls, endpoint: Endpoint, *, has_text: bool = False,
        on_choices: Callable[[list[Choice]], None] | None = None,
    ) -> Connection:  # fmt: skip
        """Connect to `endpoint`. Raises OSError."""
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if endpoint.is_tls else None
        _, connection = await loop.create_connection(
            lambda: cls(has_text=has_text, on_choices=on_choices),
            endpoint.host,
            endpoint.port,
            ssl=context,
        )
        return connection

    @classmethod
    async def over(cls, sock: socket.socket) -> Connection:
        """A connection over a socket that is connected already."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(has_text=False), sock=sock)
        return connection

    @property
    def is_usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def reply(self) -> Reply | None:
        """The reply of the exchange in flight, as far as it has arrived; None: there is none."""
        return self._reply

    async def exchange(self, request: bytes, *, started_s: float, timeout_s: float | None) -> Reply:
        """Send `request` and wait for the end of its reply, which says if it failed.

        started_s  becomes Reply.started_s.
        timeout_s  None: there is no timeout.

        Cancelling closes the connection.
        """
        assert self._reply is None, "one exchange at a time"
        reply = self._reply = Reply(started_s)
        self._reset_parser()
        if not self.is_usable:
            reply.is_unanswered = True
            self._end("connection closed before the request")
            return reply
        assert self._transport is not None
        self._finished = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._finished, timeout_s)
        except asyncio.TimeoutError:
            self._end(f"no end after {timeout_s:g} s")
        finally:
            if self._reply is not None:  # cancelled
                self._end("aborted")
        return reply

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        reply = self._reply
        if reply is None:
            return
        reply.is_unanswered = not self._head_is_read and not self._buffer
        if self._remaining is None and self._head_is_read and not self._is_chunked:
            self._end_of_body()  # the close ends a body without a length
        else:
            self._end(f"connection lost after {len(reply.chunk_times)} frames ({exc or 'closed'})")

    def data_received(self, data: bytes) -> None:
        if self._reply is None:
            self.close()  # bytes without a request, so the connection cannot be trusted any more
            return
        try:
            self._parse(data)
        except (ValueError, msgspec.MsgspecError) as error:
            self._end(f"unreadable answer: {error}"[:_ERROR_TEXT_CHARS])

    # -- HTTP ---------------------------------------------------------------------------------

    def _reset_parser(self) -> None:
        self._buffer = b""  # bytes not parsed yet: a part of the headers or of a chunk's framing
        self._line = b""  # an SSE line whose end has not arrived
        self._head_is_read = False
        self._is_chunked = False
        self._is_sse = False
        self._keep_alive = True
        self._remaining: int | None = None  # bytes left of the body or chunk; None: not known

    def _parse(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if not self._head_is_read:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD_BYTES:
                    raise ValueError("the head has no end")
                self._buffer = data
                return
            self._read_head(data[:end])
            data = data[end + 4 :]
        if self._is_chunked:
            self._parse_chunks(data, now)
            return
        self._feed(data, now)
        if self._remaining is not None:
            self._remaining -= len(data)
            if self._remaining <= 0:
                self._end_of_body()

    def _read_head(self, head: bytes) -> None:
        status_line, *lines = head.decode("latin-1").split("\r\n")
        assert self._reply is not None
        self._reply.status = int(status_line.split(" ", 2)[1])
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        retry_after = headers.get("retry-after", "")
        self._reply.retry_after_s = int(retry_after) if retry_after.isdigit() else None
        self._head_is_read = True
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._is_sse = headers.get("content-type", "").startswith("text/event-stream")
        self._keep_alive = headers.get("connection", "").lower() != "close"
        if "content-length" in headers and not self._is_chunked:
            self._remaining = int(headers["content-length"])

    def _parse_chunks(self, data: bytes, now: float) -> None:
        """Parse chunked transfer coding (RFC 9112 section 7.1). Trailers are ignored."""
        position = 0
        while True:
            if self._remaining is None:
                line_end = data.find(b"\r\n", position)
                if line_end < 0:
                    self._buffer = data[position:]
                    return
                size = int(data[position:line_end].partition(b";")[0], 16)
                if size == 0:
                    if data.find(b"\r\n\r\n", line_end) < 0:
                        self._buffer = data[position:]
                    else:
                        self._end_of_body()
                    return
                position = line_end + 2
                self._remaining = size + 2  # with the CR LF at its end
            piece = data[position : position + self._remaining]
            position += len(piece)
            self._remaining -= len(piece)
            # A chunk ends in CR LF, and a piece may end between these two bytes.
            self._feed(piece[:-2] if self._remaining == 0 else self._without_crlf(piece), now)
            if self._remaining:
                return
            self._remaining = None

    def _without_crlf(self, piece: bytes) -> bytes:
        """`piece` without the CR of the chunk's end, if only the LF of that is still missing."""
        if self._remaining == 1 and piece:
            self._buffer, self._remaining = piece[-1:], 2
            return piece[:-1]
        return piece

    # -- body ---------------------------------------------------------------------------------

    def _feed(self, piece: bytes, now: float) -> None:
        reply = self._reply
        if reply is None:
            return
        if not self._is_sse or reply.status != 200:
            reply.body += piece
            return
        lines = (self._line + piece).split(b"\n")
        self._line = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    reply.is_done = True
                else:
                    self._read_frame(payload, now, reply)

    def _read_frame(self, payload: bytes, now: float, reply: Reply) -> None:
        frame = _decode_body(payload)
        if frame.usage is not None:
            reply.usage = frame.usage
        if frame.error is not None and reply.error is None:
            reply.error = f"error in the stream: {_error_text(payload)}"
        if not frame.choices:
            return
        if self._on_choices is not None:
            self._on_choices(frame.choices)
        if _carries_tokens(frame.choices):
            reply.chunk_times.append(now)
            if frame.usage is not None:
                reply.chunk_counts.append(frame.usage.completion_tokens)
        for choice in frame.choices:
            if choice.finish_reason is not None:
                reply.finish_reasons[choice.index] = choice.finish_reason
            if self._has_text:
                text = choice.delta.content if choice.delta is not None else choice.text
                reply.texts[choice.index] = reply.texts.get(choice.index, "") + (text or "")

    def _end_of_body(self) -> None:
        reply = self._reply
        if reply is None:
            return
        error = None
        if reply.status != 200:
            error = f"HTTP {reply.status}: {_error_text(reply.body)}"
        elif self._is_sse and not reply.is_done:
            error = "the stream ended without [DONE]"
        reply.is_done = error is None
        self._end(error, is_reusable=self._keep_alive)

    def _end(self, error: str | None, *, is_reusable: bool = False) -> None:
        """End the exchange, and close the connection unless it `is_reusable`."""
        reply = self._reply
        if reply is None:
            return
        self._reply = None
        reply.ended_s = time.perf_counter()
        if reply.error is None:
            reply.error = error
        if not is_reusable:
            self.close()
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)


def read_whole(reply: Reply) -> Reply:
    """Fill usage, finish reasons and texts of a reply that was not streamed."""
    if reply.error is not None:
        return reply
    try:
        body = _decode_body(reply.body)
    except msgspec.MsgspecError as error:
        reply.error = f"unreadable body: {error}"
        return reply
    reply.usage = body.usage
    for choice in body.choices:
        text = choice.message.content if choice.message is not None else choice.text
        reply.texts[choice.index] = text or ""
        if choice.finish_reason is not None:
            reply.finish_reasons[choice.index] = choice.finish_reason
    return reply


async def fetch(
    endpoint: Endpoint,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    timeout_s: float = 30.0,
) -> Reply:
    """One exchange on a connection of its own: GET without a body, else POST. Does not raise."""
    started_s = time.perf_counter()
    try:
        connection = await asyncio.wait_for(Connection.open(endpoint, has_text=True), timeout_s)
    except (OSError, asyncio.TimeoutError) as error:
        reason = str(error) or f"no connection after {timeout_s:g} s"
        return Reply(started_s, ended_s=time.perf_counter(), error=reason)
    request = endpoint.encode("GET" if body is None else "POST", path, body)
    try:
        return await connection.exchange(request, started_s=started_s, timeout_s=timeout_s)
    finally:
        connection.close()


def _carries_tokens(choices: list[Choice]) -> bool:
    """Whether a frame may hold tokens: not if it only opens a chat message, with a role and an
    empty content.
    """
    choice = choices[0]
    delta = choice.delta
    return delta is None or delta.role is None or bool(delta.content or choice.finish_reason)


def _error_text(body: bytes) -> str:
    """The message of an OpenAI error body, or else the body itself, shortened."""
    text = body.decode("utf-8", "replace")
    try:
        decoded = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        decoded = None
    if isinstance(decoded, dict):
        error = decoded.get("error", decoded)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return text[:_ERROR_TEXT_CHARS]
