"""Server-sent events: one write per wake-up and connection, one frame per choice that has news.

Frames are built once per request but for the text in them. A slow reader stops only its own
coroutine: what it does not fetch gathers as token ids in its sequences, which are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec
from aiohttp import HttpVersion11, web

from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.http.bounds import PROBE_S
from pyserve.api.http.delivery import write
from pyserve.api.http.errors import error_body, log_unexpected
from pyserve.api.http.http_protocol import connection_of
from pyserve.api.wire.encoding import encode_line
from pyserve.api.wire.protocol import Usage
from pyserve.errors import RequestError

DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
SILENCE_S = 10.0  # then a comment goes out: proxies cut what says nothing
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",  # what compresses on the way would hold it back
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


class Frames(Protocol):
    """The frames of one request, as bytes that end in a blank line."""

    def first(self, index: int) -> bytes:
        """What comes before the first text of a choice."""
        ...

    def text(self, index: int, text: str) -> bytes: ...

    def finish(self, choice: Choice, text: str) -> bytes:
        """The last frame of a choice; it carries its last text."""
        ...

    def usage(self, usage: Usage) -> bytes: ...


class ChatFrames:
    """`chat.completion.chunk` objects."""

    def __init__(self, request_id: str, *, created: int, model: str, fingerprint: str) -> None:
        self._head = _head(request_id, b"chat.completion.chunk", created, model)
        self._fingerprint = encode_line(fingerprint)
        self._open: dict[int, bytes] = {}

    def first(self, index: int) -> bytes:
        return (
            self._choice(index)
            + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
            b'"prompt_token_ids":null,"prompt_text":null}\n\n'
        )

    def text(self, index: int, text: str) -> bytes:
        return (
            self._choice(index)
            + b'{"content":'
            + encode_line(text)
            + b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
        )

    def finish(self, choice: Choice, text: str) -> bytes:
        return (
            self._choice(choice.index)
            + b'{"content":%b},"logprobs":null,"finish_reason":%b,"stop_reason":%b,'
            b'"token_ids":null}],"system_fingerprint":%b}\n\n'
            % (
                encode_line(text),
                encode_line(choice.finish_reason),
                encode_line(choice.stop_reason),
                self._fingerprint,
            )
        )

    def usage(self, usage: Usage) -> bytes:
        return _usage(self._head, usage, self._fingerprint)

    def _choice(self, index: int) -> bytes:
        opened = self._open.get(index)
        if opened is None:
            opened = self._open[index] = b'%b{"index":%d,"delta":' % (self._head, index)
        return opened


class CompletionFrames:
    """Streamed `text_completion` objects."""

    def __init__(self, request_id: str, *, created: int, model: str, fingerprint: str) -> None:
        self._head = _head(request_id, b"text_completion", created, model)
        self._fingerprint = encode_line(fingerprint)

    def first(self, index: int) -> bytes:
        return b""

    def text(self, index: int, text: str) -> bytes:
        return (
            b'%b{"index":%d,"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null,'
            b'"prompt_token_ids":null,"token_ids":null}]}\n\n'
            % (self._head, index, encode_line(text))
        )

    def finish(self, choice: Choice, text: str) -> bytes:
        return (
            b'%b{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b,'
            b'"prompt_token_ids":null,"token_ids":null}],"system_fingerprint":%b}\n\n'
            % (
                self._head,
                choice.index,
                encode_line(text),
                encode_line(choice.finish_reason),
                encode_line(choice.stop_reason),
                self._fingerprint,
            )
        )

    def usage(self, usage: Usage) -> bytes:
        return _usage(self._head, usage, self._fingerprint)


async def send(
    request: web.Request,
    generation: Generation,
    frames: Frames,
    *,
    headers: dict[str, str],
    include_usage: bool,
    continuous_usage: bool,
) -> web.StreamResponse:
    """Answer with the stream of `generation`, from the 200 to [DONE].

    include_usage     a last frame with the usage of all choices.
    continuous_usage  every frame carries the usage of its choice so far.

    What fails from here on becomes one error frame, as the status is already sent.
    """
    response = web.StreamResponse(headers={**HEADERS, **headers})
    if request.version < HttpVersion11:
        response.force_close()  # no chunked coding there: the end of the connection ends the stream
    await response.prepare(request)
    try:
        await _send_choices(
            request, response, generation, frames, continuous_usage=continuous_usage
        )
        end = frames.usage(generation.usage()) + DONE if include_usage else DONE
    except RequestError as error:
        generation.close("error")
        end = b"data: %b\n\n" % error_body(error) + DONE
    except ConnectionError:
        raise
    except Exception as error:
        generation.close("error")
        end = b"data: %b\n\n" % error_body(log_unexpected(error)) + DONE
    await response.write_eof(end)
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


async def _send_choices(
    request: web.Request,
    response: web.StreamResponse,
    generation: Generation,
    frames: Frames,
    *,
    continuous_usage: bool,
) -> None:
    has_begun = False
    heartbeat = _Heartbeat(generation.wake)
    connection = connection_of(request)
    connection.on_probe = heartbeat.hurry
    try:
        while generation.active:
            news = await generation.read()
            chunks = []
            if news and not has_begun:
                has_begun = True
                chunks += _begin(generation, frames, continuous_usage)
            for choice, text in news:
                if choice.finish_reason is not None:
                    frame = frames.finish(choice, text)
                elif text:
                    frame = frames.text(choice.index, text)
                else:
                    continue
                if continuous_usage:
                    frame = _with_usage(frame, generation.usage_of(choice))
                chunks.append(frame)
            data = b"".join(chunks) or (COMMENT if heartbeat.is_due else b"")
            if data:
                await write(request, response, data)
                heartbeat.note()
    finally:
        connection.on_probe = None
        heartbeat.stop()


def _begin(generation: Generation, frames: Frames, continuous_usage: bool) -> list[bytes]:
    """The first frame of each choice, before any token of it has been counted."""
    chunks = []
    for choice in generation.choices:
        frame = frames.first(choice.index)
        if frame and continuous_usage:
            usage = generation.usage_of(choice)
            frame = _with_usage(
                frame,
                msgspec.structs.replace(
                    usage, completion_tokens=0, total_tokens=usage.prompt_tokens
                ),
            )
        chunks.append(frame)
    return chunks


def _with_usage(frame: bytes, usage: Usage) -> bytes:
    return b'%b,"usage":%b}\n\n' % (frame.removesuffix(b"}\n\n"), encode_line(usage))


def _head(request_id: str, kind: bytes, created: int, model: str) -> bytes:
    return b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
        encode_line(request_id),
        kind,
        created,
        encode_line(model),
    )


def _usage(head: bytes, usage: Usage, fingerprint: bytes) -> bytes:
    return b'%b],"usage":%b,"system_fingerprint":%b}\n\n' % (head, encode_line(usage), fingerprint)
