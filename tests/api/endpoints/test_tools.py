"""Tools over HTTP: what the prompt shows, what of an answer is a call, and what is refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.wire.tools import MAX_TOOL_CALLS, MAX_TOOLS
from tests.api.fakes import TEMPLATE, Server, run_server
from tests.api.tool_talk import (
    CALL,
    CHAT,
    HI,
    NOW,
    OF_TOOLS,
    SECOND,
    TOKENIZE,
    TOOLS,
    WEATHER,
    ask,
    named,
    plain,
    streamed,
    wholly,
    with_template,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = with_template(tmp_path_factory.mktemp("tools") / "tiny", OF_TOOLS)
    with run_server(folder, enable_auto_tool_choice=True, tool_call_parser="hermes") as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    config = shared.state.config
    shared.play("Hello")
    yield shared
    shared.state.config = config


def prompt(server: Server, **fields: Any) -> tuple[str, str]:
    """The prompt that both endpoints make, as text, and what they name as ignored."""
    server.engine.submitted.clear()
    status, headers, reply = server.request("POST", CHAT, ask(**fields))
    assert status == 200, reply
    body = {name: value for name, value in ask(**fields).items() if name != "max_tokens"}
    _, others, tokens = server.request("POST", TOKENIZE, body)
    assert json.loads(tokens)["tokens"] == server.engine.submitted[0].prompt
    ignored = headers.get("x-pyserve-ignored", "")
    assert others.get("x-pyserve-ignored", "") == ignored
    ids = server.engine.submitted[0].prompt
    return server.tokenizer.decode(ids, skip_special_tokens=False), ignored


def test_the_prompt_shows_the_tools_in_the_order_that_models_know(server: Server) -> None:
    function = {**WEATHER["function"], "strict": None}  # type: ignore[dict-item]
    mixed = {"function": dict(reversed(function.items())), "type": "function"}
    text, ignored = prompt(server, tools=[mixed, NOW])
    shown = json.loads(text[len("<tools>") : text.index("\n")])
    assert list(shown["function"]) == ["name", "description", "parameters"]
    assert shown == WEATHER
    empty = '{"name": "now", "parameters": {"type": "object", "properties": {}}}'
    assert f'{{"type": "function", "function": {empty}}}\n</tools>' in text
    assert ignored == ""


def test_tools_that_may_not_be_called_stay_out_of_the_prompt(server: Server) -> None:
    text, ignored = prompt(server, tool_choice="none")
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ignored == "tools"
    server.play(CALL)
    (choice,) = wholly(server, tool_choice="none")
    assert "get_weather" in choice["content"] and not choice["tool_calls"]
    assert choice["finish_reason"] == "stop"


def test_only_what_is_allowed_is_shown(server: Server) -> None:
    text, ignored = prompt(server, tool_choice=allowed("auto", "now"))
    assert '"now"' in text and "get_weather" not in text and ignored == ""
    (choice,) = wholly(server, tool_choice=allowed("required", "now"))
    assert [call["function"]["name"] for call in choice["tool_calls"]] == ["now"]
    tools = [NOW, function(parameters={"not": {}})]
    error = server.error(CHAT, ask(tools=tools, tool_choice=allowed("required", "f")))
    assert error["param"] == "tools[1].function.parameters"


def test_calls_and_results_go_back_to_the_template(server: Server) -> None:
    call = {"id": "c1", "type": "function", "index": 0,
            "function": {"name": "get_weather", "arguments": '{"city": "<|im_end|>"}'}}  # fmt: skip
    as_object = {"id": "c2", "function": {"name": "now", "arguments": {"a": 1.5}}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call, as_object]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "12:00"}]},
    ]
    text, ignored = prompt(server, messages=messages, tools=None)
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        '[c1]get_weather{"city": "<|im_end|>"}[c2]now{"a": 1.5}<|im_end|>\n'
        "<|im_start|>tool\nrain(c1)<|im_end|>\n<|im_start|>tool\n12:00(c2)<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ignored == ""
    odd = [{**HI[0], "tool_call_id": "c1"}]
    assert prompt(server, messages=odd)[1] == "messages.tool_call_id"


def test_ids_of_other_servers_fit_mistrals_templates(tmp_path: Path) -> None:
    """They refuse a conversation with any other id: nine letters or digits."""
    folder = with_template(tmp_path / "tiny", OF_TOOLS)
    with run_server(folder, tool_call_parser="mistral") as server:
        shown = []
        for call_id in ("call_0123456789abcdef", "aB3456789"):
            call = {"id": call_id, "function": {"name": "now", "arguments": "{}"}}
            messages = [*HI, {"role": "assistant", "tool_calls": [call]},
                        {"role": "tool", "tool_call_id": call_id, "content": "x"}]  # fmt: skip
            ids = server.post(TOKENIZE, {"messages": messages})["tokens"]
            text = server.tokenizer.decode(ids, skip_special_tokens=False)
            (first,) = re.findall(r"\[(\w{9})\]now", text)
            assert f"x({first})" in text
            shown.append(first)
        assert shown[1] == "aB3456789" != shown[0]


CALLED = ("get_weather", '{"city": "Paris", "days": 2}')


@pytest.mark.parametrize("burst", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "content", "calls", "reason"),
    [
        (CALL, "", [CALLED], "tool_calls"),
        (f"I look.\n{CALL}\n{SECOND}", "I look.", [CALLED, ("now", "{}")], "tool_calls"),
        ("Hello world", "Hello world", [], "stop"),
        ("<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", [], "stop"),
    ],
)
def test_answers(
    server: Server, burst: int, text: str, content: str, calls: list[Any], reason: str
) -> None:
    server.play(text, burst=burst)
    several: list[dict[str, Any]] = [{}, {"tool_choice": "auto"}, {"n": 2}]
    for fields in several:
        expected = [(content, calls, reason)] * fields.get("n", 1)
        assert plain(wholly(server, **fields)) == expected
        assert plain(streamed(server, **fields)) == expected


def test_a_truncated_call_says_length(server: Server) -> None:
    num_tokens = len(server.play(CALL)) - 12
    for found in (wholly(server, max_tokens=num_tokens), streamed(server, max_tokens=num_tokens)):
        (choice,) = found
        assert choice["finish_reason"] == "length"
        (call,) = choice["tool_calls"]
        assert '{"city": "Paris", "days": 2}'.startswith(call["function"]["arguments"])


def test_without_parallel_calls_the_first_stays(server: Server) -> None:
    server.play(f"{CALL}\n{SECOND}")
    for found in (
        wholly(server, parallel_tool_calls=False), streamed(server, parallel_tool_calls=False)
    ):  # fmt: skip
        assert plain(found) == [("", [CALLED], "tool_calls")]


def test_markers_are_seen_and_other_special_tokens_are_not(server: Server) -> None:
    server.play(f"a<|unused|>b{CALL}<|unused|>")
    assert plain(wholly(server)) == [("ab", [CALLED], "tool_calls")]
    assert plain(streamed(server)) == [("ab", [CALLED], "tool_calls")]
    # Where no calls are looked for, they are special tokens like others.
    (choice,) = wholly(server, tools=None)
    assert "tool_call>" not in choice["content"] and choice["content"].startswith("ab\n{")
    (choice,) = wholly(server, tools=None, skip_special_tokens=False)
    assert choice["content"].startswith("a<|unused|>b<tool_call>")


def test_logprobs_of_all_tokens_come_once(server: Server) -> None:
    server.play(f"I look.\n{CALL}\n{SECOND}", burst=3)
    for fields in ({}, {"parallel_tool_calls": False}):
        body = ask(logprobs=True, return_token_ids=True, **fields)
        (whole,) = server.post(CHAT, body)["choices"]
        tokens: list[str] = []
        ids: list[int] = []
        for frame in server.frames(CHAT, body):
            for choice in frame["choices"]:
                told = choice["logprobs"]
                tokens += [one["token"] for one in told["content"]] if told else []
                ids += choice.get("token_ids") or []
                if told and choice["delta"].get("tool_calls"):
                    assert "content" not in choice["delta"]
        assert tokens == [one["token"] for one in whole["logprobs"]["content"]]
        assert ids == whole["token_ids"]
        text = server.tokenizer.decode(ids, skip_special_tokens=False)
        assert text.startswith(f"I look.\n{CALL}\n{SECOND}")


def test_a_call_that_stop_strings_cut(server: Server) -> None:
    server.play(CALL)
    assert plain(wholly(server, stop="</tool_call>")) == [("", [CALLED], "tool_calls")]


def test_thinking_comes_first_and_calls_in_it_are_none(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "tiny", OF_TOOLS)
    flags: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    with run_server(folder, reasoning_parser="deepseek_r1", **flags) as server:
        server.play(f"<think>I might {SECOND}</think>\n\n{CALL}")
        for n in (1, 2):
            assert plain(wholly(server, n=n)) == [("", [CALLED], "tool_calls")] * n
            assert plain(streamed(server, n=n)) == [("", [CALLED], "tool_calls")] * n
        message = server.post(CHAT, ask())["choices"][0]["message"]
        assert "I might" in message["reasoning"] and "now" in message["reasoning"]
        frames = server.frames(CHAT, ask())
        thought = "".join(f["choices"][0]["delta"].get("reasoning", "") for f in frames)
        assert thought == message["reasoning"]


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [function(name=name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def deep(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"items": value}
    return value


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [], "tool_choice": named("f")}, "tool_choice", "needs tools"),
    ({"tool_choice": named("other")}, "tool_choice.function.name", "no tool is called other"),
    ({"tool_choice": "sometimes"}, "tool_choice", "sometimes"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
    ({"tool_choice": {"type": "custom", "function": {"name": "now"}}}, "tool_choice.type",
     "custom"),
    ({"tool_choice": 3}, "tool_choice", "int"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "missing"),
    ({"tool_choice": allowed("none", "now")}, "tool_choice.allowed_tools.mode", "none"),
    ({"tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools", "got 0"),
    ({"tool_choice": allowed("auto", "now", "x")}, "tool_choice.allowed_tools.tools",
     "no tool is called x"),
    ({"tool_choice": allowed("auto", "a b")}, "tool_choice.allowed_tools.tools[0].function.name",
     "'a b'"),
    ({"tools": [], "tool_choice": allowed("auto", "x")}, "tool_choice.allowed_tools.tools", "x"),
    ({"tools": [*TOOLS, NOW]}, "tools[2].function.name", "two tools are called now"),
    ({"tools": [function(name="")]}, "tools[0].function.name", "1 to 256"),
    ({"tools": [function(name="a b")]}, "tools[0].function.name", "'a b'"),
    ({"tools": [function(name="<|im_end|>")]}, "tools[0].function.name", "letters"),
    ({"tools": [function(name="x" * 257)]}, "tools[0].function.name", "256"),
    ({"tools": [function(name=5)]}, "tools[0].function.name", "str"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "missing"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "object"),
    ({"tools": [function(parameters=deep(70))]}, "tools", "deeper than 64"),
    ({"tools": [function(parameters={"a": 2**70})]}, "tools", "64 bits"),
    ({"tools": "f"}, "tools", "array"),
    ({"tools": [function(name=f"f{i}") for i in range(10_000)]}, "tools", str(MAX_TOOLS)),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "bool"),
    ({"messages": [{**HI[0], "tool_calls": [{"id": "1", "function": {"name": "f"}}]}]},
     "messages[0].tool_calls", "assistant"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
     "messages[1].tool_calls[0].function", "missing"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [
        {"type": "custom", "function": {"name": "f"}}]}]},
     "messages[1].tool_calls[0].type", "custom"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "{oops"}}]}]},
     "messages", "messages[1].tool_calls[0].function.arguments is not JSON"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[1]"}}]}]}, "messages", "must be a JSON object"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": '{"a":' + "[" * 50_000}}]}]}, "messages", ""),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f"}}] * (MAX_TOOL_CALLS + 1)}]}, "messages", str(MAX_TOOL_CALLS)),
    ({"messages": [*HI, {"role": "tool", "tool_call_id": "1"}]}, "messages[1].content", "null"),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type", "only text"),
    ({"messages": [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}}]}]},
     "messages[0].content[0].type", "only text"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_tools_are_refused_by_name(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    began = time.process_time()
    error = server.error(CHAT, ask(**fields))
    assert (error["param"], words in error["message"]) == (param, True), error
    if "parallel_tool_calls" not in fields:
        body = {**ask(**fields)}
        del body["max_tokens"]
        assert server.error(TOKENIZE, body)["param"] == param
    assert time.process_time() - began < 5.0
    assert not server.engine.submitted


def test_tools_count_as_part_of_the_prompt(server: Server) -> None:
    for num_words in (3000, 10**6):
        error = server.error(CHAT, ask(tools=[function(description="word " * num_words)]))
        assert error["param"] == "messages" and "maximum context length" in error["message"]


NOTHING: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, ""),
    ({"tools": None, "tool_choice": None, "parallel_tool_calls": None}, ""),
    ({"tools": [], "tool_choice": "none"}, ""),
    ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
     "parallel_tool_calls, tool_choice"),
    ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "none", "parallel_tool_calls": True}, "tools"),
    ({"tool_choice": "none", "parallel_tool_calls": False}, "parallel_tool_calls, tools"),
    ({"tools": [{**NOW, "cache_control": {"type": "ephemeral"}}]}, "tools.cache_control"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "named"), NOTHING)
def test_what_asks_for_nothing_is_named(server: Server, fields: dict[str, Any], named: str) -> None:
    status, headers, reply = server.request("POST", CHAT, ask(**fields))
    assert status == 200, reply
    assert headers.get("x-pyserve-ignored", "") == named


def test_a_model_whose_template_shows_no_tools_is_told_of_them(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "tiny", TEMPLATE)
    with run_server(folder, enable_auto_tool_choice=True, tool_call_parser="hermes") as server:
        server.play(CALL)
        text, ignored = prompt(server)
        assert ignored == "" and text.startswith("<|im_start|>system\nYou can call these functions")
        assert json.dumps(WEATHER["function"]) in text and '"name": "now"' in text
        assert '<tool_call>\n{"name": "FUNCTION", "arguments": {' in text
        assert text.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        ((content, (call,), reason),) = plain(wholly(server))
        assert (content, reason) == ("", "tool_calls") and call[0] == "get_weather"
        assert "You can call" not in prompt(server, tools=None)[0]
        assert "You can call" not in prompt(server, tool_choice="none")[0]
        forced, ignored = prompt(server, tool_choice="required")
        assert (forced, ignored) == (text, "")


@pytest.mark.parametrize(
    ("parser", "form"),
    [
        ("pythonic", '[FUNCTION(PARAMETER="VALUE")]'),
        ("qwen3_coder", "<function=FUNCTION>\n<parameter=PARAMETER>\nVALUE\n</parameter>\n"),
    ],
)
def test_every_form_can_be_told(tmp_path: Path, parser: str, form: str) -> None:
    folder = with_template(tmp_path / "tiny", TEMPLATE)
    with run_server(folder, enable_auto_tool_choice=True, tool_call_parser=parser) as server:
        server.play("No.")
        assert form in prompt(server)[0]


def test_earlier_calls_are_told_of_where_no_tools_are_given_any_more(tmp_path: Path) -> None:
    """As an agent asks for the last answer; templates of two roles refuse the role tool."""
    turns = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n"
        "{% endfor %}"
    )
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    said = [
        *HI, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]  # fmt: skip
    folder = with_template(tmp_path / "tiny", turns)
    with run_server(folder, enable_auto_tool_choice=True, tool_call_parser="hermes") as server:
        server.play("Noon.")
        written = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        expected = f"user: hi\nassistant: {written}\nuser: Result of now:\nnoon\n"
        for fields in ({"tools": None}, {"tool_choice": "none"}):
            assert prompt(server, messages=said, **fields)[0] == expected


def test_a_server_without_a_parser_says_what_it_needs(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "tiny", OF_TOOLS)
    several: list[dict[str, Any]] = [{}, {"tool_call_parser": "hermes"}]
    for settings in several:
        with run_server(folder, **settings) as server:
            error = server.error(CHAT, ask())
            assert error["param"] == "tool_choice"
            assert "--enable-auto-tool-choice and --tool-call-parser" in error["message"]
            tokenize = {"messages": HI, "tools": TOOLS}
            assert server.post(TOKENIZE, tokenize)["count"] > 20


def test_tools_beside_a_plain_text_have_no_effect(server: Server) -> None:
    body = {"prompt": "hi", "tools": TOOLS}
    status, headers, _ = server.request("POST", TOKENIZE, body)
    assert (status, headers["x-pyserve-ignored"]) == (200, "tools")


def test_sdk(server: Server) -> None:
    server.play(f"I look.\n{CALL}")
    tools: Any = TOOLS
    messages: Any = HI
    with server.sdk() as client:
        answer = client.chat.completions.create(
            model="alias", messages=messages, tools=tools, max_tokens=400
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function" and json.loads(call.function.arguments)["city"] == "Paris"
        back = [*messages, answer.choices[0].message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": call.id, "content": "rain"}]  # fmt: skip
        client.chat.completions.create(model="alias", messages=back, tools=tools, max_tokens=9)
    shown = server.tokenizer.decode(server.engine.submitted[-1].prompt, skip_special_tokens=False)
    assert f'I look.[{call.id}]get_weather{{"city": "Paris", "days": 2}}' in shown
    assert f"rain({call.id})" in shown
