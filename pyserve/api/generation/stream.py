"""Server-sent events: one write per wake-up and connection, one frame per choice that has news.

A slow reader stops only its own coroutine: what it does not fetch gathers as token ids in its
sequences, which are bounded.
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
SILENCE_S = 10.0  # then a comment goes out, as proxies cut silent connections
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",  # what compresses on the way would hold it back
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


class Frames(Protocol):
    """The frames of one answer in the words of one endpoint, as bytes that end in a blank line."""

    def begin(self) -> bytes:
        """What comes at once, while all choices wait for their turn; may be empty."""

    def first(self, choice: Choice) -> bytes:
        """What comes before the first part of a choice."""

    def part(self, choice: Choice, part: Part) -> bytes: ...

    def finish(self, choice: Choice, last: Part | None) -> bytes:
        """The end of a choice; it carries its last part, where there is one left."""

    def end(self, usage: Usage) -> bytes:
        """The end of the stream, when all choices have ended; `usage` is theirs."""

    def failed(self, error: RequestError) -> bytes:
        """The end of a stream that fails on the way."""

    def keep_alive(self, choices: Sequence[Choice]) -> bytes:
        """What goes out where nothing else has for SILENCE_S; COMMENT where there are no words."""


class Source(Protocol):
    """Where a stream comes from.

    is_over  what `read` has returned last is its end.
    """

    is_over: bool

    async def read(self) -> bytes:
        """What is to be sent next; empty where it has only been woken."""

    def wake(self) -> None:
        """Let `read` return."""

    def keep_alive(self) -> bytes:
        """What is to be sent where nothing else is."""

    def fail(self, error: Exception) -> bytes:
        """The stream ends here, with this."""


class Live:
    """The stream of a generation that runs, in the words of its endpoint."""

    def __init__(self, generation: Generation, frames: Frames) -> None:
        self.is_over = False
        self.wake = generation.wake
        self._generation = generation
        self._frames = frames
        self._has_begun = self._has_first = False

    async def read(self) -> bytes:
        """As Source has it. What fails from here on becomes the end of the stream."""
        try:
            return await self._read()
        except ConnectionError:
            raise
        except Exception as error:
            return self.fail(error)

    def keep_alive(self) -> bytes:
        """In the words of the endpoint."""
        return self._frames.keep_alive(self._generation.choices)

    def fail(self, error: Exception) -> bytes:
        """In the words of the endpoint."""
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
    """A stream that is known before it is sent."""

    def __init__(self, data: bytes) -> None:
        self.is_over = False
        self._data = data

    async def read(self) -> bytes:
        """All of it."""
        self.is_over = True
        return self._data

    def wake(self) -> None:
        """Nothing is waited for."""

    def keep_alive(self) -> bytes:
        """Nor is it silent."""
        return COMMENT

    def fail(self, error: Exception) -> bytes:
        """It is sent at once."""
        return b""


async def send(
    request: web.Request, source: Source, *, headers: dict[str, str]
) -> web.StreamResponse:
    """Answer with a stream, from the 200 to its end."""
    response = web.StreamResponse(headers={**HEADERS, **headers})
    if request.version < HttpVersion11:
        response.force_close()  # no chunked coding there: the end of the connection ends the stream
    await response.prepare(request)
    write_frame = request.writer.write  # what response.write comes to, two coroutines further
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
    """Wakes the writer of a stream that has been silent for SILENCE_S: queued, or in prefill."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.is_due = False
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._timer = self._loop.call_later(SILENCE_S, self._beat)

    def note(self) -> None:
        """Something has been said."""
        self.is_due = False
        self._last_s = self._loop.time()

    def hurry(self) -> None:
        """Say something now, unless something has been said just now."""
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
