"""functions and function_call over HTTP: as tools in the prompt, and as functions in the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.fakes import Server, run_server
from tests.api.tool_talk import (
    CALL,
    CHAT,
    HI,
    NOW,
    OF_TOOLS,
    SECOND,
    TOKENIZE,
    TOOLS,
    with_template,
)

FUNCTIONS = [tool["function"] for tool in TOOLS]
CALLED = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = with_template(tmp_path_factory.mktemp("functions") / "tiny", OF_TOOLS)
    with run_server(folder, enable_auto_tool_choice=True, tool_call_parser="hermes") as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    shared.play("Hello")
    yield shared


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": HI, "functions": FUNCTIONS, "max_tokens": 400, **fields}


def wholly(server: Server, **fields: Any) -> tuple[str | None, Any, str]:
    (choice,) = server.post(CHAT, ask(**fields))["choices"]
    message = choice["message"]
    assert "tool_calls" not in message
    return message["content"], message["function_call"], choice["finish_reason"]


def streamed(server: Server, **fields: Any) -> tuple[str | None, Any, str]:
    content, called, reason = "", None, ""
    for frame in server.frames(CHAT, ask(**fields)):
        for choice in frame["choices"]:
            delta = choice["delta"]
            assert "tool_calls" not in delta
            content += delta.get("content") or ""
            piece = delta.get("function_call")
            if called is None:
                called = piece
                assert piece is None or piece["name"]
            elif piece is not None:
                assert set(piece) == {"arguments"}
                called = {**called, "arguments": called["arguments"] + piece["arguments"]}
            reason = choice["finish_reason"] or reason
    return None if called and not content else content, called, reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALL, (None, CALLED, "function_call")),
        (f"I look.\n{CALL}\n{SECOND}", ("I look.", CALLED, "function_call")),  # one at a time
        ("Hello world", ("Hello world", None, "stop")),
    ],
)
def test_answers(server: Server, text: str, expected: Any) -> None:
    server.play(text, burst=3)
    for fields in ({}, {"function_call": "auto"}):
        assert wholly(server, **fields) == streamed(server, **fields) == expected


def test_functions_that_may_not_be_called(server: Server) -> None:
    server.play(CALL)
    for read in (wholly, streamed):
        content, called, reason = read(server, function_call="none")
        assert called is None and content and "get_weather" in content and reason == "stop"
    _, headers, _ = server.request("POST", CHAT, ask(function_call="none"))
    assert headers["x-pyserve-ignored"] == "functions"


def test_a_named_function_is_called(server: Server) -> None:
    """OpenAI says stop then, as of a named tool."""
    server.play(CALL)
    for read in (wholly, streamed):
        _, called, reason = read(server, function_call={"name": "get_weather"})
        assert called == CALLED and reason == "stop"


def test_the_prompt_is_that_of_the_same_tools(server: Server) -> None:
    def prompt(**fields: Any) -> str:
        server.post(CHAT, {"max_tokens": 4, **fields})
        ids = server.engine.submitted[-1].prompt
        return server.tokenizer.decode(ids, skip_special_tokens=False)

    old = [
        *HI,
        {"role": "assistant", "content": None, "function_call": CALLED},
        {"role": "function", "name": "get_weather", "content": "rain"},
    ]
    call = {"id": "call_0_1", "type": "function", "function": CALLED}
    new = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0_1", "content": "rain"},
    ]
    shown = prompt(messages=old, functions=FUNCTIONS)
    assert shown == prompt(messages=new, tools=TOOLS)
    assert "<|im_start|>tool\nrain(call_0_1)" in shown
    assert prompt(messages=old) == prompt(messages=new)
    tokens = [server.post(TOKENIZE, {"messages": messages})["tokens"] for messages in (old, new)]
    assert tokens[0] == tokens[1]


RESULT = {"role": "function", "name": "now", "content": "12:00"}


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"tools": TOOLS}, "functions", "functions and tools say the same"),
        ({"function_call": "auto", "tool_choice": "auto"}, "function_call", "say the same"),
        ({"function_call": "any"}, "function_call", "must be one of none, auto or name a function"),
        ({"function_call": {"name": "f"}}, "function_call.name", "no tool is called f"),
        ({"function_call": {"name": "f"}, "functions": []}, "function_call", "needs functions"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name", "functions[0].name must be 1 to"),
        ({"functions": [NOW["function"]] * 2}, "functions[1].name", "two functions are called now"),
        ({"functions": [{"description": "x"}]}, "functions[0].name", "is missing"),
        ({"functions": "now"}, "functions", "array"),
        ({"functions": [NOW["function"]] * 1025}, "functions", "the limit is 1024"),
        ({"messages": [*HI, {**RESULT, "name": None}]}, "messages[1].name", "is missing"),
        ({"messages": [*HI, {**RESULT, "content": None}]}, "messages[1].content", "null"),
        ({"messages": [{"role": "user", "content": "x", "function_call": CALLED}]},
         "messages[0].function_call", "only the assistant"),
        ({"messages": [*HI, {"role": "assistant", "function_call": CALLED,
                             "tool_calls": [{"function": CALLED}]}]},
         "messages[1].function_call", "say the same"),
        ({"messages": [*HI, {"role": "assistant", "function_call": {"arguments": "{}"}}]},
         "messages[1].function_call.name", "is missing"),
    ],
)  # fmt: skip
def test_bad_functions_are_refused_by_name(
    server: Server, fields: dict[str, Any], param: str, word: str
) -> None:
    error = server.error(CHAT, ask(**fields))
    assert error["param"] == param and word in error["message"], error
    server.play("fine")
    assert wholly(server)[0] == "fine"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"functions": None, "function_call": "none"}, None),
        ({"functions": [], "function_call": "auto"}, "function_call"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ],
)
def test_what_has_no_effect_is_named(
    server: Server, fields: dict[str, Any], named: str | None
) -> None:
    server.play("fine")
    status, headers, _ = server.request("POST", CHAT, ask(**fields))
    assert status == 200 and headers.get("x-pyserve-ignored") == named


def test_sdk(server: Server) -> None:
    server.play(CALL)
    asked: Any = ask(model="alias")
    with server.sdk() as client:
        answer = client.chat.completions.create(**asked)
        called = answer.choices[0].message.function_call
        assert called is not None and called.model_dump() == CALLED
        pieces = client.chat.completions.create(stream=True, **asked)
        deltas = [chunk.choices[0].delta.function_call for chunk in pieces if chunk.choices]
        assert "".join(delta.arguments or "" for delta in deltas if delta) == CALLED["arguments"]
