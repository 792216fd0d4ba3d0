"""tool_choice required, named and strict tools: whatever the model says, it is a valid call."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest

from pyserve.api.endpoints import tool_grammar
from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import MAX_SPEC_BYTES, Compiled, Tags
from tests.api.fakes import TEMPLATE, Server, asking_health, least, run_server
from tests.api.tool_talk import (
    CALL,
    CHAT,
    NOW,
    OF_TOOLS,
    TOOLS,
    WEATHER,
    ask,
    named,
    plain,
    streamed,
    wholly,
    with_template,
)

AUTO: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
TEXT = "I would rather not call anything."
CLOSED = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5},
          "days": {"enum": [1, 2]}}, "required": ["city", "days"],
          "additionalProperties": False}  # fmt: skip
STRICT = {"type": "function",
          "function": {"name": "get_weather", "parameters": CLOSED, "strict": True}}  # fmt: skip
BAD = {"type": "function", "function": {
    "name": "odd", "strict": True,
    "parameters": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}},
}}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": CLOSED}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tmp_path_factory.mktemp("held") / "tiny", OF_TOOLS)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with run_server(folder, **AUTO) as running:
        yield running


def valid_calls(choice: dict[str, Any], tools: list[Any]) -> list[str]:
    """Names of the calls, whose arguments are checked."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    names = []
    for call in choice["tool_calls"]:
        name = call["function"]["name"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[name] or {})
        names.append(name)
    return names


@pytest.mark.parametrize("text", [TEXT, CALL, '{"name": ', "<tool_call>{}"])
def test_required(server: Server, text: str) -> None:
    server.play(text, burst=4)
    tools = [STRICT, NOW]
    for read in (wholly, streamed):
        for n in (1, 2):
            choices = read(server, tools=tools, tool_choice="required", n=n)
            assert len(choices) == n
            for choice in choices:
                assert choice["finish_reason"] == "tool_calls" and choice["content"] == ""
                assert valid_calls(choice, tools)


@pytest.mark.parametrize("text", [TEXT, CALL])
def test_a_named_tool_is_called_once(server: Server, text: str) -> None:
    server.play(text, burst=4)
    for read in (wholly, streamed):
        (choice,) = read(server, tools=[STRICT, NOW], tool_choice=named("now"))
        assert valid_calls(choice, [STRICT, NOW]) == ["now"]
        assert choice["finish_reason"] == "stop"  # as OpenAI and vLLM have it
        (choice,) = read(server, tools=[STRICT, NOW], tool_choice=named("get_weather"))
        assert valid_calls(choice, [STRICT, NOW]) == ["get_weather"]


def test_without_parallel_calls_there_is_one(server: Server) -> None:
    server.play(f"{CALL}\n{CALL}")
    fields = {"tools": [WEATHER], "tool_choice": "required"}
    assert len(wholly(server, **fields)[0]["tool_calls"]) == 2
    assert len(wholly(server, **fields, parallel_tool_calls=False)[0]["tool_calls"]) == 1


def test_strict_tools_are_held_to_their_schema_once_called(server: Server) -> None:
    tools = [STRICT, NOW]
    server.play(TEXT, burst=4)
    assert plain(wholly(server, tools=tools)) == [(TEXT, [], "stop")]
    text = (
        'Well. <tool_call>\n{"name": "get_weather", "arguments": {"town": "Paris"}}\n</tool_call>'
    )
    server.play(text, burst=4)
    for read in (wholly, streamed):
        (choice,) = read(server, tools=tools)
        assert choice["content"].startswith("Well.") and valid_calls(choice, tools)
    # Without strict the arguments are the model's.
    (choice,) = wholly(server)
    assert choice["tool_calls"][0]["function"]["arguments"] == '{"town": "Paris"}'


def test_before_a_call_nothing_is_masked(server: Server, folder: Path) -> None:
    """A mask costs a step of its own."""

    def is_free(running: Server) -> bool:
        running.play(TEXT, burst=4)
        assert plain(wholly(running, tools=[STRICT])) == [(TEXT, [], "stop")]
        constraint = running.engine.submitted[-1].constraint
        assert constraint is not None
        return constraint.is_free

    assert is_free(server)
    with run_server(folder, reasoning_parser="deepseek_r1", **AUTO) as thinking:
        assert is_free(thinking)
        wrong = CALL.replace('"city": "Paris", "days": 2', '"town": "Paris"')
        for before in ("", "<think>Hm.</think>"):
            thinking.play(before + wrong, burst=4)
            (choice,) = wholly(thinking, tools=[STRICT])
            assert valid_calls(choice, [STRICT]) == ["get_weather"]


def deep(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


HOSTILE: list[dict[str, Any]] = [
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "a{1,50}" * 40},
    {"type": "string", "pattern": "x" * 20_000},
    {"type": "string", "pattern": "(a|b)*" * 500},
    {"type": "string", "pattern": "("},
    {"type": "string", "maxLength": 10**9},
    {"enum": [f"value {i}" for i in range(8000)]},
    {"enum": ["\0"]},
    {"$ref": "#"},
    {"$ref": "#/nowhere"},
    {"allOf": [{"pattern": f"[a-{c}]*x"} for c in "bcdefghijklmnopqrs"]},
    {"type": "array", "items": {"type": "integer"}, "minItems": 10**7},
    deep(25),
    {"type": "nothing"},
]  # fmt: skip


@pytest.mark.parametrize("schema", HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_hostile_schemas_cost_one_tool(schema: dict[str, Any], server: Server) -> None:
    """An answer or a refusal within 5 s; beside it another tool goes on working."""
    tool = {"type": "function", "function": {
        "name": "odd", "parameters": {"type": "object", "properties": {"a": schema}}}}  # fmt: skip
    server.play(CALL, burst=4)
    for tools in ([tool], [tool, STRICT]):
        began = time.process_time()
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools, "max_tokens": 40,
                "tool_choice": "required"}  # fmt: skip
        status, headers, reply = server.request("POST", CHAT, body)
        assert time.process_time() - began < 5.0
        assert status in (200, 400), reply
        if status == 400:
            assert json.loads(reply)["error"]["param"].startswith(("tools", "messages"))
        elif "tools.odd" in headers.get("x-pyserve-ignored", ""):
            assert len(tools) == 2


def test_schemas_are_bounded_in_bytes(server: Server) -> None:
    """In all, before each is looked at."""
    for count in (1000, 20_000):
        values = [f"{i}" * 200 for i in range(count)]
        parameters = {"type": "object", "properties": {"a": {"enum": values}}}
        tool = {"type": "function", "function": {"name": "large", "parameters": parameters}}
        for choice in ("required", named("large")):
            began = time.process_time()
            error = server.error(CHAT, ask(tools=[tool], tool_choice=choice))
            assert error["param"] == "tools" and str(MAX_SPEC_BYTES) in error["message"]
            assert time.process_time() - began < 5.0


def test_a_schema_for_the_answer_leaves_calls_possible(server: Server) -> None:
    fields = {"tools": TOOLS, "response_format": FORMAT}
    server.play(CALL, burst=4)
    for read in (wholly, streamed):
        assert plain(read(server, **fields)) == [
            ("", [("get_weather", '{"city": "Paris", "days": 2}')], "tool_calls")
        ]
    server.play('{"city": "Rome", "days": 7', burst=4)
    (choice,) = wholly(server, **fields)
    jsonschema.validate(json.loads(choice["content"]), CLOSED)
    assert not choice["tool_calls"]
    server.play("yes", burst=4)
    status, headers, reply = server.request(
        "POST", CHAT, ask(structured_outputs={"choice": ["yes", "no"]})
    )
    assert status == 200 and headers["x-pyserve-ignored"] == "tools"
    assert json.loads(reply)["choices"][0]["message"]["content"] == "yes"


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"guided_choice": ["a"]},
    ],
)
def test_calls_that_must_come_rule_out_another_form(server: Server, fields: dict[str, Any]) -> None:
    for choice in ("required", named("now")):
        error = server.error(CHAT, ask(tool_choice=choice, **fields))
        assert error["param"] == "tool_choice"
        assert next(iter(fields)) in error["message"]


def test_only_the_tool_that_cannot_be_enforced_is_left_out(server: Server) -> None:
    for fields in ({"tool_choice": "required"}, {}):
        server.play(CALL, burst=4)
        server.engine.submitted.clear()
        body = ask(tools=[BAD, WEATHER], **fields)
        status, headers, reply = server.request("POST", CHAT, body)
        assert status == 200, reply
        named_calls = json.loads(reply)["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["name"] for call in named_calls} == {"get_weather"}
        assert headers["x-pyserve-ignored"] == "tools.odd"
        shown = server.tokenizer.decode(
            server.engine.submitted[0].prompt, skip_special_tokens=False
        )
        assert "get_weather" in shown and "odd" not in shown
    for refused in ({"tools": [BAD]}, {"tools": [WEATHER, BAD], "tool_choice": named("odd")}):
        error = server.error(CHAT, ask(**{"tool_choice": "required", **refused}))
        place = f"tools[{len(refused['tools']) - 1}].function.parameters"
        assert error["param"] == place
        assert "the tool odd" in error["message"] and "/properties/a" in error["message"]


def test_it_needs_no_parser_and_no_template(tmp_path: Path) -> None:
    """Who must call a tool can be made to in JSON, whatever the model's own form."""
    folder = with_template(tmp_path / "tiny", TEMPLATE)
    settings: list[dict[str, Any]] = [{}, {"tool_call_parser": "qwen3_coder"}]
    for flags in settings:
        with run_server(folder, **flags) as server:
            server.play(TEXT, burst=4)
            for choice in ("required", named("get_weather")):
                (found,) = wholly(server, tools=[STRICT], tool_choice=choice)
                assert set(valid_calls(found, [STRICT])) == {"get_weather"}
            status, headers, _ = server.request(
                "POST", CHAT, ask(tools=[STRICT], tool_choice="required")
            )
            assert status == 200 and "x-pyserve-ignored" not in headers
            ids = server.engine.submitted[-1].prompt
            told = server.tokenizer.decode(ids, skip_special_tokens=False)
            assert '"name": "get_weather"' in told  # in words


# A form -> how a model begins to call in it with arguments that are wrong.
WRONG_CALLS = {
    "llama3_json": '{"name": "get_weather", "parameters": {"town": "Paris"}}',
    "pythonic": '[get_weather(town="Paris")]',
    "qwen3_coder": "Well. <tool_call>\n<function=get_weather>\n<parameter=town>\nParis\n",
}
IN_TAGS = {
    "type": "object",
    "required": ["city", "days"],
    "additionalProperties": False,
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
}


@pytest.mark.parametrize("parser", WRONG_CALLS)
def test_strict_tools_in_forms_of_their_own(folder: Path, parser: str) -> None:
    function = {"name": "get_weather", "parameters": IN_TAGS, "strict": True}
    strict = {"type": "function", "function": function}
    with run_server(folder, **{**AUTO, "tool_call_parser": parser}) as server:
        server.play(TEXT, burst=4)
        assert plain(wholly(server, tools=[strict, NOW])) == [(TEXT, [], "stop")]
        status, headers, _ = server.request("POST", CHAT, ask(tools=[strict, NOW]))
        assert status == 200 and "x-pyserve-ignored" not in headers
        server.play(WRONG_CALLS[parser], burst=4)
        for read in (wholly, streamed):
            (choice,) = read(server, tools=[strict, NOW])
            assert valid_calls(choice, [strict, NOW])[:1] == ["get_weather"]
            server.play(TEXT, burst=4)
            fields = {"tool_choice": "required", "parallel_tool_calls": False}
            (choice,) = read(server, tools=[strict, NOW], **fields)
            assert valid_calls(choice, [strict, NOW]) and choice["content"] == ""
            server.play(WRONG_CALLS[parser], burst=4)


_LIST = '[{"name": "get_weather", "arguments": {"town": "Paris"}}]'
_DEEPSEEK = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"town": "Paris"}\n```<｜tool▁call▁end｜>'
)
# A form -> a call by which the grammar does not know calls, and one by which it does, both wrong.
UNKNOWN_CALLS = {
    "granite": (_LIST, f"<tool_call>{_LIST}"),
    "phi4_mini_json": (f"functools {_LIST}", f"functools{_LIST}"),
    "llama3_json": (f"A <|python_tag|>{_LIST[1:-1]}", _LIST[1:-1]),
    "pythonic": ('A <|python_start|>[get_weather(town="x")]', '[get_weather(town="x")]'),
    "deepseek_v3": (_DEEPSEEK, f"<｜tool▁calls▁begin｜>{_DEEPSEEK}"),
}


@pytest.mark.parametrize("parser", UNKNOWN_CALLS)
def test_what_no_grammar_has_held_is_no_strict_call(folder: Path, parser: str) -> None:
    unknown, known = UNKNOWN_CALLS[parser]
    with run_server(folder, **{**AUTO, "tool_call_parser": parser}) as server:
        server.play(unknown, burst=4)
        assert plain(wholly(server, tools=[STRICT])) == [(unknown, [], "stop")]
        assert wholly(server)[0]["tool_calls"]  # without strict it is one
        for read in (wholly, streamed):
            server.play(known, burst=4)
            (choice,) = read(server, tools=[STRICT])
            assert valid_calls(choice, [STRICT])


def test_strict_is_named_where_a_form_has_no_words_for_a_schema(folder: Path) -> None:
    flags = {**AUTO, "tool_call_parser": "qwen3_coder"}
    with run_server(folder, **flags) as server:
        server.play(TEXT, burst=4)
        status, headers, _ = server.request("POST", CHAT, ask(tools=[STRICT]))
        assert (status, headers["x-pyserve-ignored"]) == (200, "tools.get_weather.strict")
        (choice,) = wholly(server, tools=[STRICT], tool_choice="required")  # in plain JSON
        assert set(valid_calls(choice, [STRICT])) == {"get_weather"}


@pytest.mark.parametrize("num_values", [4000, 60_000])
def test_large_schemas_in_such_a_form_do_not_hold_up_others(folder: Path, num_values: int) -> None:
    values = {"type": "object", "properties": {"a": {"enum": [f"{i}x" for i in range(num_values)]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": values, "strict": True}}
    with run_server(folder, **{**AUTO, "tool_call_parser": "qwen3_coder"}) as server:
        server.play(TEXT, burst=4)

        def slowest_s() -> float:
            began_s = time.process_time()
            with asking_health(server) as latencies_s:
                error = server.error(CHAT, ask(tools=[tool]))
            assert time.process_time() - began_s < 5
            assert error["param"] in ("tools", "messages")
            return max(latencies_s, default=0.0)

        assert least(slowest_s, 0.5) < 0.5  # far above what is measured, 20 ms


def test_thinking_is_free(folder: Path) -> None:
    with run_server(folder, reasoning_parser="deepseek_r1", **AUTO) as server:
        server.play(f"<think>Hm, no.</think>\n\n{TEXT}", burst=4)
        for read in (wholly, streamed):
            (choice,) = read(server, tools=[STRICT], tool_choice="required")
            assert set(valid_calls(choice, [STRICT])) == {"get_weather"}
            assert choice["finish_reason"] == "tool_calls" and choice["content"] == ""
        message = server.post(CHAT, ask(tools=[STRICT], tool_choice="required"))
        assert "Hm, no." in message["choices"][0]["message"]["reasoning"]


def test_too_many_tools_are_refused_by_their_number(server: Server) -> None:
    """Each of them could be enforced, which is not what takes long."""
    parameters = {"type": "object", "properties": {}}
    tools = [{"type": "function", "function": {"name": f"f{index}", "parameters": parameters}}
             for index in range(600)]  # fmt: skip
    error = server.error(CHAT, ask(tools=tools, tool_choice="required"))
    assert error["param"] == "tools" and "500" in error["message"]


def test_many_tools_take_little_time(server: Server) -> None:
    def tool(i: int) -> dict[str, Any]:
        return {"type": "function", "function": {"name": f"f{i}", "parameters": {
            "type": "object", "properties": {f"a{i}": {"type": "string"}}}}}  # fmt: skip

    server.play(TEXT, burst=4)
    for count in (200, 700):
        began = time.process_time()
        tools = [tool(i) for i in range(count)]
        for t in tools:
            del t["function"]["parameters"]["type"]  # shorter
        status, _, reply = server.request("POST", CHAT, ask(tools=tools, tool_choice="required"))
        assert status == 400 and json.loads(reply)["error"]["param"] in ("messages", "tools")
        assert time.process_time() - began < 5.0


def test_tools_are_tried_in_the_order_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their trials have a time limit, so the order decides which tools are reached."""
    names = [f"tool_{n * 7 % 40}" for n in range(40)]
    tried: list[str] = []

    class Refusing:
        def compile(self, spec: Tags) -> Compiled:
            tried.append(spec.param)
            raise InvalidRequestError("no", spec.param)

    def look(schema: object, *, param: str) -> None:
        tried.append(param)

    monkeypatch.setattr(tool_grammar, "engine_schema", look)
    places = {name: place for place, name in enumerate(names)}
    schemas: dict[str, dict[str, Any]] = {name: {} for name in names}
    with pytest.raises(InvalidRequestError, match="the tool tool_0: no"):
        tool_grammar._compile(cast(Any, Refusing()), lambda schemas: {}, schemas, places)
    fields = [f"tools[{place}].function.parameters" for place in range(40)]
    assert tried == [*fields, "tools", *fields]
