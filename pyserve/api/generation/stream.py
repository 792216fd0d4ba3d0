"""Server-sent events: each wake-up of a stream is one write, with the frames of all new parts.

A slow reader blocks only its own coroutine. What it has not read yet stays in its sequences as
token ids, whose number is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from aiohttp import HttpVersion11, web

from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.http.bounds import PIECE_BYTES, PROBE_S
from pyserve.api.http.delivery import write_large
from pyserve.api.http.errors import log_unexpected
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.wire.protocol import Usage
from pyserve.errors import AbortedError, RequestError, release_frames
from pyserve.text.parts import Part

COMMENT = b": keep-alive\n\n"
SILENCE_S = 10.0  # after this time a comment is sent, because proxies cut silent connections
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",  # a proxy that compresses would delay the frames
    "X-Accel-Buffering": "no",  # nginx would buffer the stream
}


class Frames(Protocol):
    """Formats the frames of one response in the format of one endpoint.

    Every method returns zero or more whole server-sent events, each of which ends in a blank line.
    """

    def begin(self) -> bytes:
        """Frames that are sent at once, while all choices are still queued; may be empty."""

    def first(self, choice: Choice) -> bytes:
        """Frames that come before the first part of a choice."""

    def part(self, choice: Choice, part: Part) -> bytes: ...

    def finish(self, choice: Choice, last: Part | None) -> bytes:
        """The end of a choice, with its last part, if one is left to send."""

    def end(self, usage: Usage) -> bytes:
        """The end of the stream, after all choices have ended; `usage` is the usage of them all."""

    def failed(self, error: RequestError) -> bytes:
        """The end of a stream that fails after it has begun."""

    def keep_alive(self, choices: Sequence[Choice]) -> bytes:
        """Frames to send after SILENCE_S; COMMENT where the endpoint has no event for that."""


class Source(Protocol):
    """What `send` reads a stream's data from.

    is_over  what `read` returned last was the end of the stream.
    """

    is_over: bool

    async def read(self) -> bytes:
        """Wait for the data to send next; empty where `wake` was called and there is none."""

    def wake(self) -> None:
        """Let `read` return, even without data."""

    def keep_alive(self) -> bytes:
        """Data to send to a client that has got nothing else for a while."""

    def fail(self, error: Exception) -> bytes:
        """End the stream because of `error`; returns the data to send as its end."""


class Live:
    """Implements Source for a running generation, in the format of its endpoint."""

    def __init__(self, generation: Generation, frames: Frames) -> None:
        self.is_over = False
        self.wake = generation.wake
        self._generation = generation
        self._frames = frames
        self._has_begun = self._has_first = False

    async def read(self) -> bytes:
        """See Source. All errors but that of a lost connection become the end of the stream."""
        try:
            return await self._read()
        except ConnectionError:
            raise
        except Exception as error:
            return self.fail(error)

    def keep_alive(self) -> bytes:
        return self._frames.keep_alive(self._generation.choices)

    def fail(self, error: Exception) -> bytes:
        """See Source. Also ends the generation, and logs an error that is a bug of ours."""
        self.is_over = True
        self._generation.close("abort" if isinstance(error, AbortedError) else "error")
        if not isinstance(error, RequestError):
            return self._frames.failed(log_unexpected(error))
        end = self._frames.failed(error)
        release_frames(error)
        return end

    async def _read(self) -> bytes:
        generation, frames = self._generation, self._frames
        if not self._has_begun:
            self._has_begun = True
            if begin := frames.begin():
                return begin
        if not generation.active:
            end = frames.end(generation.usage())
            self.is_over = True
            return end
        news = await generation.read()
        chunks: list[bytes] = []
        if news and not self._has_first:
            self._has_first = True
            chunks += map(frames.first, generation.choices)
        for choice, parts in news:
            if choice.finish_reason is None:
                for part in parts:
                    chunks.append(frames.part(choice, part))
            else:
                *earlier, last = parts or (None,)
                chunks += [frames.part(choice, part) for part in earlier if part is not None]
                chunks.append(frames.finish(choice, last))
        return b"".join(chunks)


class Said:
    """Implements Source for a stream whose data is known before it is sent."""

    def __init__(self, data: bytes) -> None:
        self.is_over = False
        self._data = data

    async def read(self) -> bytes:
        """Return all data at once."""
        self.is_over = True
        return self._data

    def wake(self) -> None:
        """Do nothing: `read` never waits."""

    def keep_alive(self) -> bytes:
        """Never needed, because `read` never waits."""
        return COMMENT

    def fail(self, error: Exception) -> bytes:
        """End without an error frame, in place of data that there is no room to send."""
        return b""


async def send(
    request: web.Request, source: Source, *, headers: dict[str, str]
) -> web.StreamResponse:
    """Send the data of `source` as the response, until it is over; returns the response."""
    response = web.StreamResponse(headers={**HEADERS, **headers})
    if request.version < HttpVersion11:
        # HTTP/1.0 has no chunked encoding: closing the connection is what ends the stream.
        response.force_close()
    await response.prepare(request)
    write_frame = request.writer.write  # what response.write calls, without two coroutines between
    heartbeat = _Heartbeat(source.wake)
    connection = connection_of(request)
    connection.on_probe = heartbeat.hurry
    try:
        while True:
            data = await source.read()
            if source.is_over:
                break
            if not data and heartbeat.is_due:
                data = source.keep_alive()
            if not data:
                continue
            if len(data) <= PIECE_BYTES:
                await write_frame(data)
            else:
                try:
                    await write_large(request, response, data)
                except RequestError as error:
                    data = source.fail(error)
                    break
            heartbeat.note()
    finally:
        connection.on_probe = None
        heartbeat.stop()
    await response.write_eof(data)
    return response


class _Heartbeat:
    """Wakes the writer of a stream after SILENCE_S without data: it is queued, or in prefill.

    is_due  something should be sent now, even if it is only a comment.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.is_due = False
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(SILENCE_S, self._beat)

    def note(self) -> None:
        """Note that something has been sent."""
        self.is_due = False
        self._last_s = self._loop.time()

    def hurry(self) -> None:
        """Have something sent now, unless something was sent within PROBE_S / 2."""
        if self._loop.time() - self._last_s > PROBE_S / 2:
            self.is_due = True
            self._wake()

    def stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        rest_s = self._last_s + SILENCE_S - self._loop.time()
        if rest_s <= 0.0:
            self.is_due = True
            self._wake()
            rest_s = SILENCE_S
        self._timer = self._loop.call_later(rest_s, self._beat)
