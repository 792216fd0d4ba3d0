"""The Messages API's answer: parts -> content blocks, whole or as a stream; its error object."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import msgspec
from msgspec import UNSET

from pyserve.api.endpoints.answer import Dialect, Head
from pyserve.api.endpoints.messages_request import Read
from pyserve.api.endpoints.messages_turns import hidden
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.job import Job
from pyserve.api.http import request_id
from pyserve.api.http.errors import MAX_MESSAGE_CHARS
from pyserve.api.wire.encoding import encode_line
from pyserve.api.wire.messages import (
    AnswerBlock,
    BlockDelta,
    BlockStart,
    BlockStop,
    MessageDelta,
    MessagesErrorDetail,
    MessagesErrorResponse,
    MessagesEvent,
    MessagesResponse,
    MessageStart,
    MessageStop,
    MessagesUsage,
    Ping,
    SignatureDelta,
    StopDelta,
    TextBlock,
    ThinkingBlock,
    ThinkingDetails,
    ToolUseBlock,
)
from pyserve.api.wire.protocol import Usage
from pyserve.errors import ContextError, RequestError
from pyserve.text.parts import Content, Part, Reasoning, ToolCall, joined

SIGNATURE = "pyserve"  # signature of visible thinking; clients send it back and it is not checked
ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip
_NO_INPUT = b"{}"


def error_body(error: RequestError) -> bytes:
    """Anthropic's error object as one line of JSON, so that it can also end a stream."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    message = error.message
    if isinstance(error, ContextError):  # clients recognise the case by this wording
        message = f"prompt is too long: {error.num_tokens} tokens > {error.max_model_len} maximum"
    detail = MessagesErrorDetail(kind, message[:MAX_MESSAGE_CHARS])
    return encode_line(MessagesErrorResponse(error=detail, request_id=request_id.current.get()))


def dialect(read: Read) -> Dialect:
    """The Dialect for the answer to one request."""

    def frames(head: Head, job: Job) -> MessagesFrames:
        return MessagesFrames(head, read)

    def whole(head: Head, generation: Generation) -> bytes:
        (choice,) = generation.choices
        has_called = any(isinstance(part, ToolCall) for part in choice.parts)
        stop = _stop(choice, read, has_called=has_called)
        return msgspec.json.encode(
            MessagesResponse(
                id=head.id,
                model=head.model,
                content=_blocks(choice.parts, read),
                stop_reason=stop.stop_reason,
                stop_sequence=stop.stop_sequence,
                usage=_usage(generation.usage()),
            )
        )

    return Dialect(id_prefix="msg_", frames=frames, whole=whole)


class MessagesFrames:
    """The events of one streamed answer.

    A content block starts with the first part that has something to show, and stops when a part of
    another block comes. An answer without any such part gets one empty text block.
    """

    def __init__(self, head: Head, read: Read) -> None:
        self._head = head
        self._read = read
        self._has_begun = False
        self._block: object = None  # _key of the open block; None: no block is open
        self._shown: type[Part] | None = None  # type of its parts, if their text is sent as it is
        self._index = -1  # of the open or the last block
        self._before = b""  # the encoded delta event of the open block, up to its text
        self._thinking: list[str] = []  # texts of omitted thinking, which the signature will hold
        self._choice: Choice | None = None  # set when the choice has ended
        self._has_called = False

    def begin(self) -> bytes:
        """Nothing yet: the first event reports the number of cached prompt tokens, which is only
        known when the request has left the queue."""
        return b""

    def first(self, choice: Choice) -> bytes:
        """The message_start event, once: `keep_alive` may have sent it already."""
        if self._has_begun:
            return b""
        self._has_begun = True
        usage = msgspec.structs.replace(
            _usage(choice.usage()), output_tokens=0, output_tokens_details=UNSET
        )
        message = MessagesResponse(
            id=self._head.id,
            model=self._head.model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=usage,
        )
        return _frame(MessageStart(message))

    def keep_alive(self, choices: Sequence[Choice]) -> bytes:
        """A ping. As it must not be the first event, message_start goes before it if need be.

        The number of cached prompt tokens may still be unknown then; the usage at the end has it.
        """
        return b"".join(map(self.first, choices)) + _frame(Ping())

    def part(self, choice: Choice, part: Part) -> bytes:
        if part.__class__ is self._shown and not isinstance(part, ToolCall) and part.text:
            return b"%b%b}}\n\n" % (self._before, encode_line(part.text))  # the most frequent case
        key = _key(part)
        if key is None:
            return b""
        begun = b""
        if key != self._block:
            begun = self._stop() + self._start(key, part)
        if isinstance(part, Reasoning) and self._read.has_omitted_thinking:
            self._thinking.append(part.text)
            return begun
        text = part.arguments if isinstance(part, ToolCall) else part.text
        return begun + b"%b%b}}\n\n" % (self._before, encode_line(text)) if text else begun

    def finish(self, choice: Choice, last: Part | None) -> bytes:
        self._choice = choice
        events = self.part(choice, last) if last is not None else b""
        if self._index < 0:
            events += self._start((Content, 0), Content(""))
        return events + self._stop()

    def end(self, usage: Usage) -> bytes:
        assert self._choice is not None
        stop = _stop(self._choice, self._read, has_called=self._has_called)
        return _frame(MessageDelta(stop, _usage(usage))) + _frame(MessageStop())

    def failed(self, error: RequestError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error_body(error)

    def _start(self, key: object, part: Part) -> bytes:
        self._block = key
        is_shown = isinstance(part, Content) or not self._read.has_omitted_thinking
        self._shown = type(part) if is_shown and not isinstance(part, ToolCall) else None
        self._index += 1
        block: AnswerBlock
        kind, field = "text_delta", "text"
        if isinstance(part, ToolCall):
            block = ToolUseBlock(part.id or "", part.name or "", {})
            kind, field = "input_json_delta", "partial_json"
            self._has_called = True
        elif isinstance(part, Reasoning):
            block = ThinkingBlock("", "")
            kind, field = "thinking_delta", "thinking"
        else:
            block = TextBlock("")
        self._before = (
            f'event: content_block_delta\ndata: {{"type":"content_block_delta",'
            f'"index":{self._index},"delta":{{"type":"{kind}","{field}":'
        ).encode()
        return _frame(BlockStart(self._index, block))

    def _stop(self) -> bytes:
        if self._block is None:
            return b""
        signed = b""
        if self._block == (Reasoning, 0):
            signature = hidden("".join(self._thinking)) if self._thinking else SIGNATURE
            self._thinking.clear()
            signed = _frame(BlockDelta(self._index, SignatureDelta(signature)))
        self._block = self._shown = None
        return signed + _frame(BlockStop(self._index))


def _key(part: Part) -> object:
    """A key that is equal for parts of the same content block; None: the part shows nothing."""
    if isinstance(part, ToolCall):
        return ToolCall, part.index
    return (type(part), 0) if part.text else None


def _blocks(parts: Sequence[Part], read: Read) -> list[AnswerBlock]:
    shown = [part for part in parts if _key(part) is not None]
    blocks = [_block(joined(list(group))[0], read) for _, group in groupby(shown, _key)]
    return blocks or [TextBlock("")]


def _block(part: Part, read: Read) -> AnswerBlock:
    if isinstance(part, ToolCall):
        return ToolUseBlock(part.id or "", part.name or "", _input(part.arguments))
    if isinstance(part, Content):
        return TextBlock(part.text)
    if read.has_omitted_thinking:
        return ThinkingBlock("", hidden(part.text))
    return ThinkingBlock(part.text, SIGNATURE)


def _input(arguments: str) -> dict[str, Any]:
    """The call's arguments as raw JSON, just as the model wrote them.

    {} if they are not a JSON object, as when the answer was cut off inside the call.
    """
    data = arguments.encode()
    try:
        msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        data = _NO_INPUT
    return cast("dict[str, Any]", msgspec.Raw(data))


def _stop(choice: Choice, read: Read, *, has_called: bool) -> StopDelta:
    """Why the answer has ended, as Anthropic's stop_reason and stop_sequence."""
    if choice.finish_reason == "length":
        is_full = choice.num_tokens < read.max_tokens
        return StopDelta("model_context_window_exceeded" if is_full else "max_tokens", None)
    if has_called:
        return StopDelta("tool_use", None)
    if isinstance(choice.stop_reason, str):
        return StopDelta("stop_sequence", choice.stop_reason)
    return StopDelta("end_turn", None)


def _usage(usage: Usage) -> MessagesUsage:
    num_cached_tokens = usage.prompt_tokens_details.cached_tokens
    asked = usage.completion_tokens_details
    details = UNSET if asked is UNSET else ThinkingDetails(asked.reasoning_tokens)
    return MessagesUsage(
        input_tokens=usage.prompt_tokens - num_cached_tokens,
        cache_read_input_tokens=num_cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=details,
    )


def _frame(event: MessagesEvent) -> bytes:
    tag = type(event).__struct_config__.tag
    return b"event: %b\ndata: %b\n\n" % (str(tag).encode(), encode_line(event))
