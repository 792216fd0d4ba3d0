"""Every kind of frame of a stream, field by field and in order, as vLLM's clients expect them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.fakes import MODEL, TEMPLATE, Server, run_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
USAGE = {"include_usage": True}
SAID = '<think>So</think>Hi <tool_call>\n{"name": "get", "arguments": {"x": 1}}\n</tool_call>'

STRING, INTEGER, NUMBER = "a string", "an integer", "a number"
SEVERAL, RATED = "a list of integers", "numbers by name"
HEAD = (("id", STRING), ("object", "chat.completion.chunk"), ("created", INTEGER), ("model", MODEL))
TEXT_HEAD = (("id", STRING), ("object", "text_completion"), *HEAD[2:])
FINGERPRINT = ("system_fingerprint", STRING)
COUNTS = tuple((n, INTEGER) for n in ("prompt_tokens", "total_tokens", "completion_tokens"))
DETAILS = ("prompt_tokens_details", (("cached_tokens", INTEGER),))
THOUGHT = ("completion_tokens_details", (("reasoning_tokens", INTEGER),))
FIRST_CALL = (
    ("id", STRING), ("type", "function"), ("index", 0),
    ("function", (("name", "get"), ("arguments", STRING))),
)  # fmt: skip
MORE_CALL = (("index", 0), ("function", (("arguments", STRING),)))


def chat(
    delta: Any,
    *more: Any,
    logprobs: Any = None,
    reason: Any = None,
    ended: tuple[Any, ...] = (),
) -> Any:
    """A chat frame of one choice; `more` is at the top, `ended` behind the finish reason."""
    choice = (
        ("index", 0), ("delta", delta), ("logprobs", logprobs), ("finish_reason", reason), *ended,
    )  # fmt: skip
    return (*HEAD, ("choices", [choice]), *more)


IDS = (("token_ids", None),)
ENDED = (("stop_reason", None), ("token_ids", None))
ROLE = chat(
    (("role", "assistant"), ("content", "")), ("prompt_token_ids", None), ("prompt_text", None)
)
SHAPES = {
    "role": ROLE,
    "content": chat((("content", STRING),), ended=IDS),
    "reasoning": chat((("reasoning", STRING), ("reasoning_content", STRING)), ended=IDS),
    "call": chat((("tool_calls", [FIRST_CALL]),), ended=IDS),
    "more of a call": chat((("tool_calls", [MORE_CALL]),), ended=IDS),
    "stop": chat((("content", STRING),), FINGERPRINT, reason="stop", ended=ENDED),
    "length": chat((("content", STRING),), FINGERPRINT, reason="length", ended=ENDED),
    "tool_calls": chat((), FINGERPRINT, reason="tool_calls", ended=ENDED),
    "usage": (*HEAD, ("choices", []), ("usage", (*COUNTS, DETAILS)), FINGERPRINT),
    "usage of thinking": (
        *HEAD, ("choices", []), ("usage", (*COUNTS, DETAILS, THOUGHT)), FINGERPRINT,
    ),
}  # fmt: skip


TOLD = (("token", STRING), ("logprob", NUMBER), ("bytes", SEVERAL))
LOGPROBS = (("content", [(*TOLD, ("top_logprobs", [TOLD]))]),)
TOLD_IDS = (("token_ids", SEVERAL),)
# With logprobs, top_logprobs 1, return_token_ids and return_prompt_text.
TOLD_SHAPES = {
    "role": chat(
        (("role", "assistant"), ("content", "")),
        ("prompt_token_ids", SEVERAL), ("prompt_text", STRING),
    ),
    "content": chat((("content", STRING),), logprobs=LOGPROBS, ended=TOLD_IDS),
    "stop": chat(
        (("content", STRING),), FINGERPRINT, logprobs=LOGPROBS, reason="stop",
        ended=(("stop_reason", None), *TOLD_IDS),
    ),
}  # fmt: skip


def text(
    *more: Any,
    logprobs: Any = None,
    reason: Any = None,
    token_ids: Any = None,
    prompt_token_ids: Any = None,
) -> Any:
    """A frame of a completion."""
    choice = (
        ("index", 0), ("text", STRING), ("logprobs", logprobs), ("finish_reason", reason),
        ("stop_reason", None), ("token_ids", token_ids), ("prompt_token_ids", prompt_token_ids),
    )  # fmt: skip
    return (*TEXT_HEAD, ("choices", [choice]), *more)


TEXT_SHAPES = {
    "text": text(),
    "stop": text(FINGERPRINT, reason="stop"),
    "length": text(FINGERPRINT, reason="length"),
    "usage": (*TEXT_HEAD, ("choices", []), ("usage", (*COUNTS, DETAILS)), FINGERPRINT),
}
TEXT_LOGPROBS = (
    ("text_offset", SEVERAL), ("token_logprobs", [NUMBER]), ("tokens", [STRING]),
    ("top_logprobs", [RATED]),
)  # fmt: skip
TEXT_TOLD_SHAPES = {
    "first": text(logprobs=TEXT_LOGPROBS, token_ids=SEVERAL, prompt_token_ids=SEVERAL),
    "text": text(logprobs=TEXT_LOGPROBS, token_ids=SEVERAL),
    "length": text(FINGERPRINT, logprobs=TEXT_LOGPROBS, token_ids=SEVERAL, reason="length"),
}


def shape_of(value: Any, expected: Any) -> Any:
    """`value` in the words of `expected`, where it fits them; else as it is."""
    if expected == SEVERAL and isinstance(value, list) and {type(v) for v in value} == {int}:
        return expected
    if expected == RATED and isinstance(value, dict) and {*map(type, value.values())} == {float}:
        return expected
    if isinstance(value, dict):
        inner = dict(expected) if isinstance(expected, tuple) else {}
        return tuple((key, shape_of(item, inner.get(key))) for key, item in value.items())
    if isinstance(value, list):
        like = expected if isinstance(expected, list) else []
        return [shape_of(item, like[i] if i < len(like) else None) for i, item in enumerate(value)]
    if (
        (isinstance(value, str) and expected == STRING)
        or (type(value) is int and expected == INTEGER)
        or (type(value) is float and expected == NUMBER)
    ):
        return expected
    return value


def check(frames: list[Any], names: list[str], shapes: dict[str, Any]) -> None:
    """The frames have these shapes, in this order; several alike count as one."""
    kinds: list[str] = []
    for frame in frames:
        fitting = [name for name, shape in shapes.items() if shape_of(frame, shape) == shape]
        assert len(fitting) == 1, (fitting, frame)
        if kinds[-1:] != fitting:
            kinds += fitting
    assert kinds == names
    assert len({(frame["id"], frame["created"]) for frame in frames}) == 1


@pytest.fixture(scope="module")
def parsing(tokenizer_folder: Path) -> Iterator[Server]:
    config: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    config |= {"reasoning_parser": "deepseek_r1", "trust_request_chat_template": True}
    with run_server(tokenizer_folder, **config) as running:
        yield running


def ask_with_tools(**fields: Any) -> dict[str, Any]:
    return ask(tools=TOOLS, chat_template=TEMPLATE + "{% if tools %}{% endif %}", **fields)


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], **fields}


def test_chat_frames(server: Server) -> None:
    server.play("Hello world, how are you?")
    check(server.frames(CHAT, ask()), ["role", "content", "stop"], SHAPES)
    server.play("Hello world, how are you?")
    asked = ask(stream_options=USAGE, max_tokens=3)
    check(server.frames(CHAT, asked), ["role", "content", "length", "usage"], SHAPES)


def test_frames_of_thinking_and_calls(parsing: Server) -> None:
    parsing.play(SAID)
    frames = parsing.frames(CHAT, ask_with_tools(stream_options=USAGE))
    names = [
        "role", "reasoning", "content", "call", "more of a call", "tool_calls",
        "usage of thinking",
    ]  # fmt: skip
    check(frames, names, SHAPES)


def test_completion_frames(server: Server) -> None:
    server.play("Hello world, how are you?")
    asked = {"prompt": "hi", "max_tokens": 3}
    check(server.frames(COMPLETIONS, asked), ["text", "length"], TEXT_SHAPES)
    asked = {"prompt": "hi", "max_tokens": 99, "stream_options": USAGE}
    check(server.frames(COMPLETIONS, asked), ["text", "stop", "usage"], TEXT_SHAPES)


def test_frames_that_tell_of_tokens(server: Server) -> None:
    server.play("Hello world")
    asked = ask(logprobs=True, top_logprobs=1, return_token_ids=True, return_prompt_text=True)
    check(server.frames(CHAT, asked), ["role", "content", "stop"], TOLD_SHAPES)
    server.play("Hello world, how are you?")
    told = {"prompt": "hi", "max_tokens": 3, "return_token_ids": True, "logprobs": 1}
    frames = server.frames(COMPLETIONS, told)
    check(frames, ["first", "text", "length"], TEXT_TOLD_SHAPES)


def test_usage_in_every_frame(parsing: Server) -> None:
    parsing.play(SAID)
    options = {**USAGE, "continuous_usage_stats": True}
    frames = parsing.frames(CHAT, ask_with_tools(stream_options=options))
    usage = ("usage", (*COUNTS, DETAILS, THOUGHT))
    for frame in frames:
        shown = dict(shape_of(frame, (usage,)))
        assert ("usage", shown["usage"]) == usage
        assert list(frame)[5] == "usage"
