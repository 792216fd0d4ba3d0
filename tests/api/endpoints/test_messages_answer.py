"""Parts -> blocks: the order and the fields of every event, and that a stream is the whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyserve.api.endpoints.answer import Head
from pyserve.api.endpoints.messages_answer import SIGNATURE, dialect, error_body
from pyserve.api.endpoints.messages_request import Read
from pyserve.api.endpoints.messages_turns import hidden
from pyserve.api.endpoints.renamed import Renamed
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.job import Job
from pyserve.api.wire.protocol import (
    ChatRequest,
    CompletionTokensDetails,
    PromptTokensDetails,
    Usage,
)
from pyserve.errors import (
    BodyTooLargeError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    RequestError,
    UnauthorizedError,
    UnavailableError,
)
from pyserve.text.parts import Content, Part, Reasoning, ToolCall, num_chars
from tests.api.message_talk import events, put_together
from tests.text.tool_parsers.answers import every_cut, some_cuts

HEAD = Head("msg_1", 0, "m")
USAGE = Usage(30, 37, 7, PromptTokensDetails(16), CompletionTokensDetails(3))
SAID = {
    "input_tokens": 14, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 16,
    "output_tokens": 7, "output_tokens_details": {"thinking_tokens": 3},
}  # fmt: skip
AT_FIRST = {
    "input_tokens": 14, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 16,
    "output_tokens": 0,
}  # fmt: skip
CALL = [ToolCall(0, "c1", "get", '{"a"'), ToolCall(0, arguments=": [1]}")]


def read(*, is_omitted: bool = False, max_tokens: int = 100) -> Read:
    return Read(ChatRequest(messages=[]), Renamed([]), is_omitted, max_tokens)


def ended(
    parts: Sequence[Part],
    finish: str = "stop",
    reason: int | str | None = None,
    num_tokens: int = 7,
) -> Any:
    """A choice that has ended so."""
    return SimpleNamespace(
        index=0, parts=list(parts), finish_reason=finish, stop_reason=reason,
        num_tokens=num_tokens, usage=lambda: USAGE,
    )  # fmt: skip


def streamed(parts: Sequence[Part], asked: Read, **how: Any) -> list[tuple[str, dict[str, Any]]]:
    """(event, data) of each frame."""
    choice = ended(parts, **how)
    frames = dialect(asked).frames(HEAD, Job(prompts=[], params=[], ending=cast(Any, None)))
    *earlier, last = parts or (None,)
    sent = frames.first(choice)
    for part in earlier:
        assert part is not None
        sent += frames.part(choice, part)
    sent += frames.finish(choice, last) + frames.end(USAGE)
    return events(sent)


def wholly(parts: Sequence[Part], asked: Read, **how: Any) -> dict[str, Any]:
    generation = SimpleNamespace(choices=[ended(parts, **how)], usage=lambda: USAGE)
    whole: dict[str, Any] = json.loads(dialect(asked).whole(HEAD, cast(Generation, generation)))
    return whole


def block(index: int, started: dict[str, Any], *deltas: dict[str, Any]) -> list[Any]:
    return [
        ("content_block_start", {"index": index, "content_block": started}),
        *(("content_block_delta", {"index": index, "delta": delta}) for delta in deltas),
        ("content_block_stop", {"index": index}),
    ]


def text(index: int, *texts: str) -> list[Any]:
    deltas = [{"type": "text_delta", "text": text} for text in texts]
    return block(index, {"type": "text", "text": ""}, *deltas)


def thinking(index: int, signature: str, *texts: str) -> list[Any]:
    deltas = [{"type": "thinking_delta", "thinking": text} for text in texts]
    signed = {"type": "signature_delta", "signature": signature}
    return block(index, {"type": "thinking", "thinking": "", "signature": ""}, *deltas, signed)


def call(index: int, id: str, name: str, *texts: str) -> list[Any]:
    deltas = [{"type": "input_json_delta", "partial_json": text} for text in texts]
    return block(index, {"type": "tool_use", "id": id, "name": name, "input": {}}, *deltas)


TABLE: list[tuple[str, list[Part], list[Any], str]] = [
    ("nothing", [], text(0), "end_turn"),
    ("empty", [Content(""), Content("")], text(0), "end_turn"),
    ("text", [Content("He"), Content('l"o\u2028')], text(0, "He", 'l"o\u2028'), "end_turn"),
    ("thinking", [Reasoning("So"), Reasoning(" é")], thinking(0, SIGNATURE, "So", " é"),
     "end_turn"),
    ("thinking and text", [Reasoning("So"), Content("a")],
     [*thinking(0, SIGNATURE, "So"), *text(1, "a")], "end_turn"),
    ("an empty text between", [Reasoning("So"), Content(""), Reasoning("!"), Content("a")],
     [*thinking(0, SIGNATURE, "So", "!"), *text(1, "a")], "end_turn"),
    ("a call", list(CALL), call(0, "c1", "get", '{"a"', ": [1]}"), "tool_use"),
    ("a call without pieces", [ToolCall(0, "c1", "get")], call(0, "c1", "get"), "tool_use"),
    ("everything",
     [Reasoning("So"), Content("a"), *CALL, ToolCall(1, "c2", "f", "{}"), Content("b")],
     [*thinking(0, SIGNATURE, "So"), *text(1, "a"), *call(2, "c1", "get", '{"a"', ": [1]}"),
      *call(3, "c2", "f", "{}"), *text(4, "b")], "tool_use"),
]  # fmt: skip


@pytest.mark.parametrize(("parts", "blocks", "stop"), [row[1:] for row in TABLE],
                         ids=[row[0] for row in TABLE])  # fmt: skip
def test_every_event(parts: list[Part], blocks: list[Any], stop: str) -> None:
    message: dict[str, Any] = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": AT_FIRST,
    }  # fmt: skip
    found = streamed(parts, read())
    assert found == [
        ("message_start", {"message": message}),
        *blocks,
        ("message_delta", {"delta": {"stop_reason": stop, "stop_sequence": None}, "usage": SAID}),
        ("message_stop", {}),
    ]
    assert put_together(found) == wholly(parts, read())


def test_thinking_that_is_not_shown_is_signed() -> None:
    parts: list[Part] = [Reasoning("So"), Reasoning(" é"), Content("a")]
    asked = read(is_omitted=True)
    found = streamed(parts, asked)
    assert found[1:-2] == [*thinking(0, hidden("So é")), *text(1, "a")]
    assert put_together(found) == wholly(parts, asked)


@pytest.mark.parametrize(
    ("how", "stop"),
    [
        ({}, ("end_turn", None)),
        ({"reason": "END"}, ("stop_sequence", "END")),
        ({"reason": 7}, ("end_turn", None)),
        ({"finish": "length", "num_tokens": 100}, ("max_tokens", None)),
        ({"finish": "length", "num_tokens": 99}, ("model_context_window_exceeded", None)),
    ],
)
def test_why_it_ends(how: dict[str, Any], stop: tuple[str, str | None]) -> None:
    message = wholly([Content("a")], read(), **how)
    assert (message["stop_reason"], message["stop_sequence"]) == stop
    assert put_together(streamed([Content("a")], read(), **how)) == message
    if how.get("finish") == "length":  # a call may have been cut off
        assert wholly(CALL, read(), **how)["stop_reason"] == stop[0]
    else:
        assert wholly(CALL, read(), **how)["stop_reason"] == "tool_use"


def test_the_input_of_a_call_that_was_cut_off() -> None:
    for arguments in ('{"a": ', "[1]", ""):
        (found,) = wholly([ToolCall(0, "c1", "get", arguments)], read())["content"]
        assert found == {"type": "tool_use", "id": "c1", "name": "get", "input": {}}


def test_every_cut_of_every_block_is_the_whole() -> None:
    kinds = (
        lambda text: [Reasoning(text)], lambda text: [Content(text)],
        lambda text: [ToolCall(0, arguments=text)],
    )  # fmt: skip
    texts = ('S "o', "ü\u2028b", '{"a":1}')
    cuts = [list(every_cut(text, 6)) for text in texts]
    for n, asked in itertools.product(range(64), (read(), read(is_omitted=True))):
        parts: list[Part] = []
        for make, some in zip(kinds, cuts, strict=True):
            if make is kinds[2]:
                parts.append(ToolCall(0, "c1", "get"))
            for piece in some[n % len(some)]:
                parts += cast(list[Part], make(piece))
        assert num_chars(parts) == sum(map(len, texts))
        assert put_together(streamed(parts, asked)) == wholly(parts, asked)
    for pieces in some_cuts("a long text, cut anywhere", 50, seed=1):
        parts = [Content(piece) for piece in pieces]
        assert put_together(streamed(parts, read())) == wholly(parts, read())


def test_a_silent_stream_begins_before_it_pings() -> None:
    frames = dialect(read()).frames(HEAD, Job(prompts=[], params=[], ending=cast(Any, None)))
    choice: Choice = ended([])
    assert [name for name, _ in events(frames.keep_alive([choice]))] == ["message_start", "ping"]
    assert events(frames.keep_alive([choice])) == [("ping", {})]
    assert frames.first(choice) == b""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequestError("no", "x"), "invalid_request_error"),
        (UnauthorizedError("no"), "authentication_error"),
        (NotFoundError("no"), "not_found_error"),
        (BodyTooLargeError("no"), "request_too_large"),
        (QueueFullError("no"), "rate_limit_error"),
        (EngineError("no"), "api_error"),
        (UnavailableError("no"), "overloaded_error"),
    ],
)
def test_errors(error: RequestError, kind: str) -> None:
    said = json.loads(error_body(error))
    assert said.pop("request_id")
    assert said == {"type": "error", "error": {"type": kind, "message": "no"}}
    frames = dialect(read()).frames(HEAD, Job(prompts=[], params=[], ending=cast(Any, None)))
    ((name, data),) = events(frames.failed(error))
    assert (name, data["error"]) == ("error", {"type": kind, "message": "no"})
