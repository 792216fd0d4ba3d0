"""POST /v1/responses: items in, items and events out, streamed as whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyserve.api.endpoints.answer import Head
from pyserve.api.endpoints.responses_answer import Answering, Output, ResponseFrames
from pyserve.api.endpoints.responses_request import read_request
from pyserve.api.generation.generate import Choice
from pyserve.api.wire.protocol import PromptTokensDetails, Usage
from pyserve.api.wire.responses import MAX_ITEMS, ResponsesRequest
from pyserve.errors import EngineError
from pyserve.text.parts import Part, joined
from tests.api.fakes import Script, Server, run_server
from tests.api.response_talk import RESPONSES, built, parse, plain, stream
from tests.api.tool_talk import CALL, OF_TOOLS, SECOND, with_template
from tests.text.tool_parsers.answers import every_cut, parts_of, some_cuts

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "name": "get_weather", "parameters": CITY}
NOW = {"type": "function", "name": "now"}
PATCH = {"type": "custom", "name": "patch", "description": "Apply a patch"}
CLOCK = {"type": "namespace", "name": "clock", "tools": [NOW]}
SAID = f"<think>So it is.</think>Hello {CALL}{SECOND}"
PATCHED = '<tool_call>\n{"name": "patch", "arguments": {"input": "a\\n\\"b\\""}}\n</tool_call>'
CONTEXT = 4096
USER = {"role": "user", "content": "hi"}
CALLED = {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "noon"}

BEGIN = ["created", "in_progress"]
REASONING = [
    "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
    "content_part.done", "output_item.done",
]  # fmt: skip
SUMMARY = [
    "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
    "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
]  # fmt: skip
MESSAGE = [
    "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
    "content_part.done", "output_item.done",
]  # fmt: skip
CALLING = [
    "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
    "output_item.done",
]  # fmt: skip
CUSTOM = [
    "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done",
    "output_item.done",
]  # fmt: skip
# Beside type and sequence_number.
FIELDS = {
    "created": {"response"}, "in_progress": {"response"}, "completed": {"response"},
    "incomplete": {"response"}, "failed": {"response"},
    "output_item.added": {"output_index", "item"}, "output_item.done": {"output_index", "item"},
    "content_part.added": {"item_id", "output_index", "content_index", "part"},
    "content_part.done": {"item_id", "output_index", "content_index", "part"},
    "reasoning_summary_part.added": {"item_id", "output_index", "summary_index", "part"},
    "reasoning_summary_part.done": {"item_id", "output_index", "summary_index", "part"},
    "output_text.delta": {"item_id", "output_index", "content_index", "delta", "logprobs"},
    "output_text.done": {"item_id", "output_index", "content_index", "text", "logprobs"},
    "reasoning_text.delta": {"item_id", "output_index", "content_index", "delta"},
    "reasoning_text.done": {"item_id", "output_index", "content_index", "text"},
    "reasoning_summary_text.delta": {"item_id", "output_index", "summary_index", "delta"},
    "reasoning_summary_text.done": {"item_id", "output_index", "summary_index", "text"},
    "function_call_arguments.delta": {"item_id", "output_index", "delta"},
    "function_call_arguments.done": {"item_id", "output_index", "name", "arguments"},
    "custom_tool_call_input.delta": {"item_id", "output_index", "delta"},
    "custom_tool_call_input.done": {"item_id", "output_index", "input"},
    "error": {"code", "message", "param", "error"},
}  # fmt: skip


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = with_template(tmp_path_factory.mktemp("responses") / "tiny", OF_TOOLS)
    with run_server(
        folder, enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3"
    ) as server:
        server.engine.info = replace(server.engine.info, max_model_len=CONTEXT)
        yield server


def ask(**fields: Any) -> dict[str, Any]:
    return {"input": "hi", **fields}


def prompt_of(server: Server) -> str:
    return server.tokenizer.decode(server.engine.submitted[-1].prompt, skip_special_tokens=False)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Their types, several of one kind in a row as one; each has the fields of its kind."""
    found: list[str] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        assert set(event) - {"type", "sequence_number"} == FIELDS[kind]
        if found[-1:] != [kind]:
            found.append(kind)
    return found


@pytest.mark.parametrize(
    ("said", "fields", "order"),
    [
        ("Hello world", {}, [*MESSAGE, "completed"]),
        ("", {}, [k for k in MESSAGE if "delta" not in k] + ["completed"]),
        ("Hello world", {"max_output_tokens": 2}, [*MESSAGE, "incomplete"]),
        ("<think>So</think>Hi", {}, [*REASONING, *MESSAGE, "completed"]),
        ("<think>So</think>Hi", {"reasoning": {"summary": "auto"}},
         [*SUMMARY, *MESSAGE, "completed"]),
        (SAID, {"tools": [WEATHER, NOW]}, [*REASONING, *MESSAGE, *CALLING, *CALLING, "completed"]),
        (SAID, {"tools": [WEATHER, NOW], "parallel_tool_calls": False},
         [*REASONING, *MESSAGE, *CALLING, "completed"]),
        (PATCHED, {"tools": [PATCH]}, [*CUSTOM, "completed"]),
    ],
    ids=["text", "nothing", "length", "thinking", "summary", "calls", "one call", "custom"],
)  # fmt: skip
def test_events_in_their_order(
    talking: Server, said: str, fields: dict[str, Any], order: list[str]
) -> None:
    talking.play(said)
    events = stream(talking, ask(**fields))
    assert kinds(events) == [*BEGIN, *order]
    responses = [event["response"] for event in events if "response" in event]
    assert len({(one["id"], one["created_at"]) for one in responses}) == 1
    first, last = responses[0], responses[-1]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert last["status"] == order[-1] and set(first) == set(last)
    assert built(events) == last["output"]
    talking.play(said)
    whole = talking.post(RESPONSES, ask(**fields))
    assert plain(whole["output"], whole["id"]) == plain(last["output"], last["id"])
    for name in set(whole) - {"id", "created_at", "completed_at", "output"}:
        assert whole[name] == last[name], name
    statuses = [item["status"] for item in whole["output"]]
    assert statuses == ["completed"] * (len(statuses) - 1) + [whole["status"]]
    reason = {"reason": "max_output_tokens"} if whole["status"] == "incomplete" else None
    assert whole["incomplete_details"] == reason


def test_items_name_the_tools_of_the_client(talking: Server) -> None:
    talking.play(SAID.replace('"now"', '"clock__now"') + PATCHED)
    answer = talking.post(RESPONSES, ask(tools=[WEATHER, CLOCK, PATCH, {"type": "web_search"}]))
    thought, message, weather, now, patch = answer["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "So it is."}]
    assert message["content"][0]["text"] == "Hello"
    assert (weather["name"], json.loads(weather["arguments"])) == (
        "get_weather", {"city": "Paris", "days": 2},
    )  # fmt: skip
    assert "namespace" not in weather and (now["namespace"], now["name"]) == ("clock", "now")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", 'a\n"b"')
    usage = answer["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    again = ask(input=[USER, *answer["output"]], tools=[WEATHER, CLOCK, PATCH])
    talking.post(RESPONSES, again)
    assert "clock__now{}" in prompt_of(talking)
    assert '"input": "a\\n\\"b\\""' in prompt_of(talking)


def test_a_failure_on_the_way(talking: Server) -> None:
    talking.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
    events = stream(talking, ask())
    assert kinds(events)[-2:] == ["failed", "error"]
    failed, error = events[-2:]
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "a step failed"}
    assert error["message"] == error["error"]["message"] == "a step failed"
    assert talking.error(RESPONSES, ask(), 500)["message"] == "a step failed"


def told(parts: list[Part], body: ResponsesRequest) -> tuple[list[dict[str, Any]], list[Any]]:
    """The events of parts that come one by one, and the items of the same parts at once."""
    asked = read_request(body, [], [USER])
    answering = Answering(asked, 1.0, 1.0, False, lambda head, data, events=(): None)
    head = Head("resp_0", 1, "m")
    choice = cast(Choice, SimpleNamespace(words=None, finish_reason="stop"))
    frames = ResponseFrames(answering, head)
    data = frames.begin() + b"".join(frames.part(choice, part) for part in parts)
    data += frames.finish(choice, None) + frames.end(Usage(1, 2, 1, PromptTokensDetails(0)))
    output = Output("resp_0", asked)
    for part in joined(parts):
        output.push(choice, part)
    output.end("stop")
    return parse(data), output.items


def test_every_cut_of_a_text_is_the_same_response() -> None:
    body = ResponsesRequest(tools=[WEATHER, NOW, PATCH])
    found = set()
    for pieces in [*every_cut(f"a {SECOND} b", 9), *some_cuts(f"Hi {CALL}{PATCHED} x", 200, 1)]:
        parts = [part for some in parts_of("hermes", pieces) for part in some]
        events, whole = told(parts, body)
        items = built(events)
        assert items == events[-1]["response"]["output"] and len(items) == len(whole)
        texts = [item.get("arguments", item.get("input", item.get("content"))) for item in items]
        found.add((("".join(pieces)), json.dumps(texts)))
    assert len(found) == 2  # one for each text


def test_logprobs_come_with_their_texts(talking: Server) -> None:
    fields = ask(include=["message.output_text.logprobs", "file_search_call.results"])
    talking.play("Hello world")
    events = stream(talking, {**fields, "top_logprobs": 2})
    talking.play("Hello world")
    status, headers, reply = talking.request("POST", RESPONSES, {**fields, "top_logprobs": 2})
    part = json.loads(reply)["output"][0]["content"][0]
    assert built(events)[0]["content"][0] == part
    assert "".join(entry["token"] for entry in part["logprobs"]).startswith("Hello world")
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}
    assert headers["x-pyserve-ignored"] == "include.file_search_call.results"
    _, headers, reply = talking.request("POST", RESPONSES, ask(top_logprobs=2))
    assert headers["x-pyserve-ignored"] == "top_logprobs"
    assert json.loads(reply)["output"][0]["content"][0]["logprobs"] == []


def test_what_the_model_is_given(talking: Server) -> None:
    talking.play("Hello")
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "thought"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me see", "annotations": []}]},
        {**CALLED, "namespace": "clock", "id": "fc_1", "status": "completed"},
        {**RESULT, "output": [{"type": "input_text", "text": "noon"}], "id": "fco_1"},
        {"type": "web_search_call", "action": {"type": "search"}},
    ]  # fmt: skip
    body = ask(input=items, instructions="Be brief", tools=[CLOCK])
    _, headers, _ = talking.request("POST", RESPONSES, body)
    tools, _, prompt = prompt_of(talking).partition("</tools>")
    assert '"clock__now"' in tools
    assert prompt == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>developer\nD<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nLet me see[c1]clock__now{}<|im_end|>\n"
        "<|im_start|>tool\nnoon(c1)<|im_end|>\n<|im_start|>assistant\n"
    ).replace("developer", "system")
    assert headers["x-pyserve-ignored"] == "input.reasoning, input.web_search_call"


def test_an_answer_that_is_not_finished_goes_on(talking: Server) -> None:
    talking.play(" world")
    said = {"type": "message", "role": "assistant", "status": "incomplete", "content": "Hello"}
    talking.post(RESPONSES, ask(input=[USER, said]))
    assert prompt_of(talking).endswith("<|im_start|>assistant\nHello")


@pytest.mark.parametrize(
    ("choice", "mode"),
    [
        ("required", "required"), ({"type": "function", "name": "now"}, "required"),
        ({"type": "function", "name": "now", "namespace": "clock"}, "required"),
        ({"type": "custom", "name": "patch"}, "required"),
        ({"type": "allowed_tools", "mode": "required", "tools": [
            {"type": "function", "name": "now"}, {"type": "mcp", "server_label": "x"}]},
         "required"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "namespace", "name": "clock"}]}, "auto"),
        ("none", "none"),
    ],
)  # fmt: skip
def test_forms_of_tool_choice(talking: Server, choice: Any, mode: str) -> None:
    talking.play("<think>So</think>Hello", burst=64)
    answer = talking.post(
        RESPONSES, ask(tools=[WEATHER, NOW, CLOCK, PATCH], tool_choice=choice, max_output_tokens=99)
    )
    _, first, *_ = answer["output"]
    assert (first["type"] == "message") == (mode != "required")
    if isinstance(choice, dict) and "name" in choice:
        assert first["name"] == choice["name"]
        assert first.get("namespace") == choice.get("namespace")
    shown = prompt_of(talking).partition("</tools>")[0]
    if isinstance(choice, dict) and choice["type"] == "allowed_tools":
        assert "get_weather" not in shown
        assert ("clock__now" in shown) == (mode == "auto")
    assert answer["tool_choice"] == choice


def test_the_form_of_a_text(talking: Server) -> None:
    talking.play("<think>So</think>Hello", eos=False, burst=64)
    schema = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    answer = talking.post(RESPONSES, ask(text={"format": form, "verbosity": "low"}))
    assert json.loads(answer["output"][-1]["content"][0]["text"]) == {"a": 7}
    assert answer["text"] == {"format": form, "verbosity": "low"}
    answer = talking.post(RESPONSES, ask(text={"format": {"type": "text"}}, max_output_tokens=3))
    assert answer["text"] == {"format": {"type": "text"}}


def test_what_was_asked_is_shown_again(talking: Server) -> None:
    talking.play("Hello")
    asked: dict[str, Any] = {
        "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k",
        "temperature": 0.5, "top_p": 0.25, "max_output_tokens": 9, "truncation": "auto",
        "instructions": "Be brief", "parallel_tool_calls": False, "tools": [NOW],
        "presence_penalty": 0.5, "frequency_penalty": 0.25,
    }  # fmt: skip
    answer = talking.post(RESPONSES, ask(**asked, reasoning={"effort": "low"}))
    assert {name: answer[name] for name in asked} == asked
    assert answer["reasoning"] == {"effort": "low", "summary": None}


def test_a_limit_beyond_the_context_is_clamped(talking: Server) -> None:
    talking.play("Hello")
    _, headers, _ = talking.request("POST", RESPONSES, ask(max_output_tokens=32000))
    left = CONTEXT - len(talking.engine.submitted[-1].prompt)
    assert headers["x-pyserve-clamped"] == f"max_output_tokens={left}"


HOSTILE: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "input is missing"),
    ({"input": []}, "input", "input must hold at least one item"),
    ({"input": 5}, "input", "input: expected"),
    ({"input": [5]}, "input[0]", "input[0]: expected"),
    ({"input": [USER] * (MAX_ITEMS + 1)}, "input", f"more than {MAX_ITEMS} items"),
    ({"input": [{}] * 10**6}, "", "the body holds more than 131072 values"),
    ({"input": [{"type": 5}]}, "input[0].type", "input[0].type must be a string"),
    ({"input": [{"role": "user"}]}, "input[0].content", "input[0].content is missing"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "got int"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "got tool"),
    ({"input": [USER, {"role": "user", "content": [{"type": "input_image"}]}]},
     "input[1].content[0].type", "text only"),
    ({"input": [USER, {"role": "user", "content": [{"type": "input_file"}]}]},
     "input[1].content[0].type", "text only"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
     "input[0].content[0].text", "is missing"),
    ({"input": [USER, RESULT]}, "input[1].call_id", "no call before it has the id c1"),
    ({"input": [USER, CALLED, {**RESULT, "call_id": "c2"}]}, "input[2].call_id", "id c2"),
    ({"input": [USER, {**CALLED, "arguments": "{"}]}, "input", "input[1].arguments is not JSON"),
    ({"input": [USER, {**CALLED, "call_id": None}]}, "input[1].call_id", "got null"),
    ({"input": [USER, {"type": "custom_tool_call", "call_id": "x", "name": "y"}]},
     "input[1].input", "is missing"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at least 1, got 0"),
    ({"input": "fox " * 5000}, "input", "maximum context length"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "tools[0].name is missing"),
    ({"tools": [NOW, {"type": "function", "name": "a b"}]}, "tools[1].name", "got 'a b'"),
    ({"tools": [CLOCK, {**CLOCK, "tools": [NOW, {"type": "function", "name": "?"}]}]},
     "tools[1].tools[0].name", "two tools are called clock__now"),
    ({"tools": [{}]}, "tools[0].type", "must be a string"),
    ({"tool_choice": "required"}, "tool_choice", "required needs tools"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name",
     "no tool is called x"),
    ({"tools": [NOW], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "got mcp"),
    ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice.name", "is missing"),
    ({"tools": [NOW], "tool_choice": {"type": "allowed_tools", "tools": [
        {"type": "function", "name": "x"}]}}, "tool_choice.tools[0].name", "no tool is called x"),
    ({"text": {"format": {"type": "x"}}}, "text.format.type", "got x"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing"),
    ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": 1}}}},
     "text.format.schema", "cannot be enforced"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
     "structured_outputs.regex", "text.format and structured_outputs.regex both"),
    ({"reasoning": {"effort": "x"}}, "reasoning.effort", "got x"),
    ({"reasoning": {"summary": "x"}}, "reasoning.summary", "got x"),
    ({"truncation": "x"}, "truncation", "got x"),
    ({"top_logprobs": 99, "include": ["message.output_text.logprobs"]}, "top_logprobs", "got 99"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "17 entries, the limit is 16"),
    ({"metadata": {"a": "b" * 513}}, "metadata", "got 1 and 513"),
    ({"metadata": {"a": 1}}, "metadata[...]", "got int"),
    ({"user": "u" * 513}, "user", "513 characters, the limit is 512"),
    ({"conversation": "conv_1"}, "conversation", "send previous_response_id"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "not built yet"),
    ({"thinking_token_budget": -2}, "thinking_token_budget", "got -2"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "said"), HOSTILE, ids=lambda value: str(value)[:40])
def test_bad_input(talking: Server, fields: dict[str, Any], param: str, said: str) -> None:
    is_too_long = "context length" in said
    for streamed in (False,) if is_too_long else (False, True):
        error = talking.error(RESPONSES, ask(stream=streamed, **{**fields}))
        assert (error["param"] or "") == param and said in error["message"], error
    assert talking.post(RESPONSES, ask())["status"] == "completed"


def test_a_stream_tells_that_the_conversation_is_too_long(talking: Server) -> None:
    """In OpenAI's code for it, which lets an agent shorten it and go on."""
    events = stream(talking, ask(input="fox " * 5000))
    assert kinds(events) == [*BEGIN, "failed", "error"]
    error = events[-2]["response"]["error"]
    assert error["code"] == events[-1]["code"] == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]
    assert events[-1]["param"] == "input"
    body = ask(input="fox " * 5000, mood=1, stream=True)
    status, headers, _ = talking.request("POST", RESPONSES, body)
    assert (status, headers["x-pyserve-ignored"]) == (200, "mood")


def test_ignored_fields_are_named(talking: Server) -> None:
    talking.play("Hello")
    secret = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x" * 99}
    body = ask(
        input=[USER, secret], client_metadata={"a": "b"}, max_tool_calls=3, unheard_of=1,
        include=["reasoning.encrypted_content"], service_tier="flex", stream_options={},
        tools=[{**PATCH, "format": {"type": "grammar", "syntax": "lark", "definition": "x"}}],
    )  # fmt: skip
    _, headers, _ = talking.request("POST", RESPONSES, body)
    assert headers["x-pyserve-ignored"] == (
        "client_metadata, include.reasoning.encrypted_content, input.encrypted_content, "
        "max_tool_calls, service_tier, tools.format, unheard_of"
    )
