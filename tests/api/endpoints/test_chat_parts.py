"""Reasoning and tool calls in chat answers: the same parts in frames and in whole messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pyserve.api.endpoints import chat_job
from pyserve.api.endpoints.openai import make_job
from pyserve.api.generation.job import Job
from pyserve.text.parts import Content, Part, Reasoning, ToolCall
from tests.api.fakes import Server

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
CALLS = (
    ToolCall(0, "call-1", "get", '{"x"'), ToolCall(0, arguments=": 1}"), ToolCall(1, "call-2", "f"),
    ToolCall(1, arguments="{}"),
)  # fmt: skip


class Says:
    """Gives the next of `parts` for each text that comes, and what is left at the end."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    def push(self, content: Content) -> Sequence[Part]:
        return [self._parts.pop(0)] if len(self._parts) > 1 else ()

    def flush(self) -> Sequence[Part]:
        return self._parts


def say(monkeypatch: pytest.MonkeyPatch, parts: Sequence[Part], **ending: Any) -> None:
    """Let every answer be `parts`."""

    async def make(*args: Any, **kwargs: Any) -> Job:
        job = await make_job(*args, **kwargs)
        return msgspec.structs.replace(
            job, make_stage=lambda: Says(parts), ending=replace(job.ending, **ending)
        )

    monkeypatch.setattr(chat_job, "make_job", make)


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **fields}


def deltas(server: Server, **fields: Any) -> list[dict[str, Any]]:
    role, *frames = server.frames(PATH, ask(**fields))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    return [frame["choices"][0] for frame in frames]


def test_reasoning_and_calls_in_frames(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, [Reasoning("So"), Reasoning(' "it" '), Content("é"), *CALLS])
    server.play("Hello world, how are you?")
    choices = deltas(server)
    assert [choice["delta"] for choice in choices] == [
        {"reasoning": "So", "reasoning_content": "So"},
        {"reasoning": ' "it" ', "reasoning_content": ' "it" '},
        {"content": "é"},
        {"tool_calls": [{"id": "call-1", "type": "function", "index": 0,
                         "function": {"name": "get", "arguments": '{"x"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"id": "call-2", "type": "function", "index": 1,
                         "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
    ]  # fmt: skip
    *earlier, last = choices
    assert {choice["finish_reason"] for choice in earlier} == {None}
    assert (last["finish_reason"], last["stop_reason"]) == ("tool_calls", None)
    assert list(choices[3]["delta"]["tool_calls"][0]) == ["id", "type", "index", "function"]


def test_the_whole_message_is_the_same(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, [Reasoning("So"), Reasoning(' "it" '), *CALLS])
    server.play("Hello world, how are you?")
    (choice,) = server.post(PATH, ask())["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert list(choice["message"].items()) == [
        ("role", "assistant"), ("content", None), ("refusal", None), ("annotations", None),
        ("audio", None), ("function_call", None),
        ("tool_calls", [
            {"id": "call-1", "type": "function",
             "function": {"name": "get", "arguments": '{"x": 1}'}},
            {"id": "call-2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        ]),
        ("reasoning", 'So "it" '), ("reasoning_content", 'So "it" '),
    ]  # fmt: skip


def test_content_is_null_only_beside_something_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[list[Part], str | None]] = [
        ([], ""), ([Reasoning("So")], None), ([*CALLS], None), ([Content("a"), *CALLS], "a"),
        ([Reasoning("So"), Content("a")], "a"),
    ]  # fmt: skip
    for parts, content in cases:
        with monkeypatch.context() as patch:
            say(patch, parts)
            server.play("Hello world, how are you?")
            message = server.post(PATH, ask())["choices"][0]["message"]
            assert message["content"] == content
            assert ("tool_calls" in message) is (ToolCall in map(type, parts))


def test_the_end_of_an_answer_that_calls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.play("Hello world")
    say(monkeypatch, CALLS[:1], call_reason="stop")  # the client had named the tool
    assert deltas(server)[-1]["finish_reason"] == "stop"
    assert server.post(PATH, ask())["choices"][0]["finish_reason"] == "stop"
    say(monkeypatch, CALLS[:1])  # an answer that is cut off says so
    server.play("Hello world, how are you?", eos=False)
    assert deltas(server, max_tokens=3)[-1]["finish_reason"] == "length"
    assert server.post(PATH, ask(max_tokens=3))["choices"][0]["finish_reason"] == "length"


def test_usage_in_every_kind_of_frame(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, [Reasoning("So"), Content("a"), *CALLS])
    server.play("Hello world, how are you?")
    options = {"include_usage": True, "continuous_usage_stats": True}
    frames = server.frames(PATH, ask(stream_options=options))
    counts = [frame["usage"]["completion_tokens"] for frame in frames]
    assert counts[0] == 0 and counts[1:7] == [1, 2, 3, 4, 5, counts[-1]]


def test_an_echo_is_content_whatever_the_stage_says(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, [Reasoning("So"), Content("a")])
    server.play("Hello world")
    messages = [*MESSAGES, {"role": "assistant", "content": "And"}]
    asked = {"messages": messages, "echo": True, "add_generation_prompt": False}
    message = server.post(PATH, asked)["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("Anda", "So")
