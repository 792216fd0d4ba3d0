"""POST /v1/messages over HTTP: what a request becomes, what is refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.endpoints.messages_turns import hidden
from pyserve.api.generation import stream
from pyserve.errors import EngineError
from tests.api.fakes import CONTEXT, MODEL, Script, Server, run_server
from tests.api.message_talk import events, put_together
from tests.api.tool_talk import CALL, SECOND, with_template

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER = {"role": "user", "content": "hi"}
TOOL = {
    "name": "get_weather", "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}},
                     "required": ["city"]},
}  # fmt: skip
USE = {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Paris"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "rain"}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }}]{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.tool_call_id %}({{ m.tool_call_id }}){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% if reasoning_effort is defined %}({{ reasoning_effort }}){% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = with_template(tmp_path_factory.mktemp("messages") / "tiny", TEMPLATE)
    with run_server(
        folder,
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        reasoning_parser="deepseek_r1",
    ) as server:
        yield server


@pytest.fixture
def agent(talking: Server) -> Server:
    talking.engine.num_cached_tokens = 0
    talking.play("Hello world")
    return talking


def ask(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 200, "messages": list(turns or (USER,)), **fields}


def post(server: Server, body: object, path: str = PATH) -> tuple[dict[str, Any], list[str]]:
    """The answer, and the names of what had no effect."""
    status, headers, reply = server.request("POST", path, body)
    assert status == 200, reply
    assert headers["request-id"] == headers["X-Request-Id"]
    names = headers.get("x-pyserve-ignored", "")
    return json.loads(reply), names.split(", ") if names else []


def prompt(server: Server, *turns: dict[str, Any], **fields: Any) -> str:
    """What the model is asked."""
    server.engine.submitted.clear()
    post(server, ask(*turns, **fields))
    (submitted,) = server.engine.submitted
    return server.tokenizer.decode(submitted.prompt, skip_special_tokens=False)


def error(server: Server, body: object, status: int = 400, path: str = PATH) -> str:
    got, headers, reply = server.request("POST", path, body)
    assert got == status, reply
    said = json.loads(reply)
    assert headers["request-id"] == headers["X-Request-Id"] == said["request_id"]
    assert set(said) == {"type", "error", "request_id"} and set(said["error"]) == {
        "type", "message",
    }  # fmt: skip
    message: str = said["error"]["message"]
    return message


def test_a_whole_answer_and_a_stream(agent: Server) -> None:
    agent.engine.num_cached_tokens = 5
    whole, ignored = post(agent, ask())
    assert whole["content"] == [{"type": "text", "text": "Hello world"}] and not ignored
    assert whole["id"].startswith("msg_") and whole["model"] == MODEL
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    status, headers, reply = agent.request("POST", f"{PATH}?beta=true", ask(stream=True))
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    found = events(reply)
    assert found[0][1]["message"]["usage"]["output_tokens"] == 0
    message = put_together(found)
    assert {**message, "id": whole["id"]} == whole
    usage = whole["usage"]
    counted = post(agent, ask(), COUNT)[0]["input_tokens"]
    assert usage["cache_read_input_tokens"] == 5 and usage["input_tokens"] == counted - 5


def test_it_pings_while_it_waits(agent: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SILENCE_S", 0.02)
    agent.play("Hi", delay_s=0.5, burst=8)
    found = events(agent.request("POST", PATH, ask(stream=True))[2])
    assert [name for name, _ in found[:2]] == ["message_start", "ping"]
    message = put_together([(name, data) for name, data in found if name != "ping"])
    assert message["content"][0]["text"] == "Hi"


def test_thinking_and_calls(agent: Server) -> None:
    agent.play(f"<think>Hm.</think>So: {CALL}\n{SECOND}")
    asked = ask(
        tools=[TOOL, {"name": "now", "input_schema": {"type": "object"}}],
        thinking={"type": "adaptive"},
    )
    whole, ignored = post(agent, asked)
    thinking, text, first, second = whole["content"]
    assert thinking["thinking"] == "Hm." and thinking["signature"] and not ignored
    assert text["text"].startswith("So:")
    assert (first["name"], first["input"]) == ("get_weather", {"city": "Paris", "days": 2})
    assert (second["name"], second["input"]) == ("now", {}) and first["id"] != second["id"]
    assert whole["stop_reason"] == "tool_use"
    assert whole["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    message = put_together(events(agent.request("POST", PATH, {**asked, "stream": True})[2]))
    for block, other in zip(message["content"], whole["content"], strict=True):
        assert {**block, "id": other.get("id")} == {**other, "id": other.get("id")}
    # The next turn: the model is shown what it wrote.
    answered = [{**RESULT, "tool_use_id": first["id"]}, {**RESULT, "tool_use_id": second["id"]}]
    turns = [USER, {"role": "assistant", "content": whole["content"]},
             {"role": "user", "content": answered}]  # fmt: skip
    shown = prompt(agent, *turns)
    assert f"<think>Hm.</think>{text['text']}[{first['id']}]get_weather" in shown


def test_only_one_call_where_only_one_may_be(agent: Server) -> None:
    agent.play(f"{CALL}\n{SECOND}")
    choice: dict[str, Any] = {"type": "auto", "disable_parallel_tool_use": True}
    tools = [TOOL, {"name": "now", "input_schema": {}}]
    whole, _ = post(agent, ask(tools=tools, tool_choice=choice))
    assert [block["type"] for block in whole["content"]] == ["tool_use"]
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        agent.play(CALL)
        whole, _ = post(agent, ask(tools=[TOOL], tool_choice=choice))
        assert whole["stop_reason"] == "tool_use"
    assert "get_weather" not in prompt(agent, tools=[TOOL], tool_choice={"type": "none"})


def test_a_stop_sequence(agent: Server) -> None:
    whole, _ = post(agent, ask(stop_sequences=["wor"]))
    assert whole["content"][0]["text"] == "Hello "
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "wor")


def test_max_tokens_are_cut_to_the_context(agent: Server) -> None:
    agent.play("Hi", eos=False, burst=64)
    status, headers, reply = agent.request("POST", PATH, ask(max_tokens=32000))
    whole = json.loads(reply)
    assert status == 200 and whole["stop_reason"] == "model_context_window_exceeded"
    left = CONTEXT - whole["usage"]["input_tokens"]
    assert headers["x-pyserve-clamped"] == f"max_tokens={left}"
    assert post(agent, ask(max_tokens=left))[0]["stop_reason"] == "max_tokens"
    long = {"role": "user", "content": "hi " * 600}
    said = error(agent, ask(long))
    assert said.startswith("prompt is too long: ") and said.endswith(f" tokens > {CONTEXT} maximum")
    assert error(agent, ask(long), path=COUNT) == said


TURNS: list[tuple[str, list[dict[str, Any]], str]] = [
    ("blocks", [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
     "<|im_start|>user\nhi<|im_end|>\n"),
    ("results before text",
     [USER, {"role": "assistant", "content": [USE]},
      {"role": "user", "content": [{"type": "text", "text": "so?"}, RESULT]}],
     '<|im_start|>assistant\n[c1]get_weather{"city": "Paris"}<|im_end|>\n'
     "<|im_start|>tool\nrain(c1)<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n"),
    ("a result that is an error",
     [USER, {"role": "assistant", "content": [USE]},
      {"role": "user", "content": [{**RESULT, "is_error": True,
                                    "content": [{"type": "text", "text": "no net"}]}]}],
     "<|im_start|>tool\nError: no net(c1)<|im_end|>\n"),
    ("a system message in the middle", [USER, {"role": "system", "content": "Be brief."}],
     "<|im_start|>user\nhi<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n"),
    ("thinking in its own block",
     [USER, {"role": "assistant", "content": [THOUGHT, {"type": "text", "text": "Yes"}]}, USER],
     "<think>Hm.</think>Yes<|im_end|>\n"),
    ("thinking that was not shown",
     [USER, {"role": "assistant", "content": [
         {"type": "thinking", "thinking": "", "signature": hidden("Hé.")},
         {"type": "text", "text": "Yes"}]}, USER],
     "<think>Hé.</think>Yes<|im_end|>\n"),
    ("text in two blocks of the assistant",
     [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"},
                                              {"type": "text", "text": "b"}]}, USER],
     "<|im_start|>assistant\nab<|im_end|>\n"),
]  # fmt: skip


@pytest.mark.parametrize(("turns", "shown"), [row[1:] for row in TURNS],
                         ids=[row[0] for row in TURNS])  # fmt: skip
def test_what_the_model_is_shown(agent: Server, turns: list[dict[str, Any]], shown: str) -> None:
    tools = [TOOL] if "tool" in shown or "get_weather" in shown else []
    assert shown in prompt(agent, *turns, tools=tools)
    counted = post(agent, ask(*turns, tools=tools), COUNT)[0]["input_tokens"]
    assert counted == len(agent.engine.submitted[-1].prompt)


def test_the_system_prompt_and_its_billing_line(agent: Server) -> None:
    head = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
    billing = "x-anthropic-billing-header: cc_version=1; cch=ab12;"
    for system in (
        "Be kind.", [{"type": "text", "text": "Be kind."}], f"{billing}\nBe kind.",
        [{"type": "text", "text": billing}, {"type": "text", "text": "Be kind."}],
    ):  # fmt: skip
        assert prompt(agent, system=system).startswith(head)
        _, ignored = post(agent, ask(system=system))
        assert ignored == (["system.x-anthropic-billing-header"] if billing in str(system) else [])
    assert prompt(agent, system=billing) == prompt(agent)


def test_a_prefill_is_continued(agent: Server) -> None:
    said = prompt(agent, USER, {"role": "assistant", "content": "The sky"})
    assert said.endswith("<|im_start|>assistant\nThe sky")
    whole, _ = post(agent, ask(USER, {"role": "assistant", "content": "The sky"}))
    assert whole["content"] == [{"type": "text", "text": "Hello world"}]
    assert prompt(agent, USER, {"role": "assistant", "content": ""}) == prompt(agent)


def test_how_much_it_thinks(agent: Server) -> None:
    def end(**fields: Any) -> str:
        return prompt(agent, **fields).rpartition("assistant\n")[2]

    off = "<think></think>"
    assert end() == off and end(thinking={"type": "disabled"}) == off
    assert end(thinking={"type": "adaptive"}) == ""
    assert end(thinking={"type": "adaptive"}, output_config={"effort": "low"}) == "(low)"
    assert end(chat_template_kwargs={"enable_thinking": True}) == ""
    budget = {"type": "enabled", "budget_tokens": 1024}
    assert end(thinking=budget, max_tokens=2000) == ""
    assert agent.engine.submitted[-1].constraint is not None
    assert post(agent, ask(thinking={**budget, "type": "disabled"}, max_tokens=2000))[1] == [
        "thinking.budget_tokens"
    ]


def test_thinking_that_was_not_asked_for_is_not_shown(agent: Server) -> None:
    agent.play("<think>Hm.</think>Yes")
    for asked in ({}, {"thinking": {"type": "disabled"}}):
        fields = {**asked, "chat_template_kwargs": {"enable_thinking": True}}
        assert post(agent, ask(**fields))[0]["content"] == [{"type": "text", "text": "Yes"}]
    shown = post(agent, ask(thinking={"type": "adaptive", "display": "omitted"}))[0]["content"]
    assert shown[0] == {"type": "thinking", "thinking": "", "signature": hidden("Hm.")}


def test_a_schema_for_the_answer(agent: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    agent.play('{"a": 1}', eos=False)
    format_ = {"type": "json_schema", "schema": schema}
    whole, _ = post(agent, ask(output_config={"format": format_}))
    assert json.loads(whole["content"][0]["text"]) == {"a": 1}


def test_what_has_no_effect_is_named(agent: Server) -> None:
    cached = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    _, ignored = post(agent, ask(
        {"role": "user", "content": [cached]}, metadata={"user_id": "u"},
        context_management={"edits": []},
        tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"},
               {**TOOL, "name": "later", "defer_loading": True}],
    ))  # fmt: skip
    assert ignored == [
        "context_management", "messages.content.cache_control", "metadata", "tools.later",
        "tools.web_search",
    ]  # fmt: skip
    blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}]
    _, ignored = post(agent, ask(USER, {"role": "assistant", "content": blocks}, USER))
    assert ignored == ["messages.content.redacted_thinking"]
    _, ignored = post(agent, ask(tool_choice={"type": "auto", "disable_parallel_tool_use": True}))
    assert ignored == ["tool_choice", "tool_choice.disable_parallel_tool_use"]


def test_a_tool_that_was_put_off_is_shown_when_something_refers_to_it(agent: Server) -> None:
    later = {**TOOL, "name": "later", "defer_loading": True}
    found = {**RESULT, "content": [{"type": "tool_reference", "tool_name": "later"}]}
    turns: list[dict[str, Any]] = [
        USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [found]},
    ]  # fmt: skip
    assert '"later"' not in prompt(agent, tools=[TOOL, later])
    shown = prompt(agent, *turns, tools=[TOOL, later])
    assert '"later"' in shown and "<|im_start|>tool\nlater(c1)" in shown


def said_by(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


AT = "messages[0].content[0]"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages must hold at least one message, got 0"),
    ({"messages": 1}, "messages: expected array"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be one of user"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    (said_by(), "messages[0].content must hold at least one block, got 0"),
    (said_by({"type": "image", "source": {"type": "url", "url": "x"}}),
     f"{AT}.type: the model reads text only, got image"),
    (said_by({"type": "document"}), f"{AT}.type: the model reads text only, got document"),
    (said_by({"type": "nothing"}), f"{AT}.type must be one of text, tool_result here, got nothing"),
    (said_by({"type": "text"}), f"{AT}.text is missing"),
    (said_by({"text": "x"}), f"{AT}.type is missing"),
    (said_by({"type": "text", "text": 1}), f"{AT}.text: expected str"),
    (said_by(RESULT), f"{AT}.tool_use_id: no tool_use before it has the id c1"),
    (said_by({"type": "tool_result"}), f"{AT}.tool_use_id is missing"),
    (said_by(USE), f"{AT}.type must be one of text, tool_result here, got tool_use"),
    (said_by(USE, role="assistant"), "messages[0]: the tool_use blocks of the last message"),
    (said_by({"type": "tool_use", "name": "x"}, role="assistant"), f"{AT}.id is missing"),
    (said_by({"type": "tool_use", "id": "x"}, role="assistant"), f"{AT}.name is missing"),
    (said_by({**USE, "input": []}, role="assistant"), f"{AT}.input: expected object"),
    (said_by({"type": "thinking"}, role="assistant"), f"{AT}.thinking is missing"),
    (said_by({"type": "thinking", "thinking": "", "signature": "pyserve:?"}, role="assistant"),
     f"{AT}.signature is not as this server has made it"),
    ({"messages": [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [
        {**RESULT, "content": [{"type": "image"}]}]}]},
     "messages[2].content[0].content[0].type: the model reads text only"),
    ({"messages": [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [
        {**RESULT, "tool_use_id": "c2"}]}]},
     "messages[2].content[0].tool_use_id: no tool_use before it has the id c2"),
    ({"system": [{"type": "image"}]}, "system[0].type: the model reads text only"),
    ({"system": 3}, "system: expected"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": 1.5}, "max_tokens must be a whole number, got 1.5"),
    ({"max_tokens": None}, "max_tokens: expected int"),
    ({"temperature": 3}, "temperature must be in [0, 2], got 3"),
    ({"stop_sequences": ["a"] * 65}, "stop_sequences has 65 strings, the limit is 64"),
    ({"stop_sequences": [""]}, "each stop_sequences string must have 1 to 1000 characters, got 0"),
    ({"thinking": {"type": "maybe"}}, "thinking.type must be one of enabled"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is missing"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1023}},
     "thinking.budget_tokens must be at least 1024, got 1023"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}},
     "thinking.budget_tokens must be less than max_tokens 200, got 1024"),
    ({"thinking": {"type": "adaptive", "display": "x"}}, "thinking.display must be one of"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort must be one of none"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type must be one of"),
    ({"output_config": {"format": {"type": "json_schema"}}},
     "output_config.format.schema is missing"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
     "output_config.format.schema"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}, {"name": "a b", "input_schema": {}}]},
     "tools[1].name must be 1 to"),
    ({"tools": [{"name": "a"}]}, "tools[0].input_schema is missing"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name is missing"),
    ({"tools": [TOOL, TOOL]}, "tools[1].name: two tools are called get_weather"),
    ({"tools": [TOOL] * 1025}, "tools has 1025 entries, the limit is 1024"),
    ({"tool_choice": {"type": "any"}}, "tool_choice: any needs tools"),
    ({"tool_choice": {"type": "all"}}, "tool_choice.type must be one of auto"),
    ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name is missing"),
    ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]},
     "tool_choice.name: no tool is called x"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs must not hold messages"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(agent: Server, fields: dict[str, Any], words: str) -> None:
    said = error(agent, {**ask(), **fields})
    assert said.startswith(words), said


def test_a_great_many_items(agent: Server) -> None:
    many = {"messages": [USER] * 5000}
    assert "1 to 4096" in error(agent, {**ask(), **many})
    one = b'{"type":"text","text":""}'
    body = b'{"max_tokens":1,"messages":[{"role":"user","content":[%b]}]}' % b",".join(
        [one] * 10**6
    )
    assert "values, the limit" in error(agent, body)
    results = [{**RESULT, "content": [{"type": "text", "text": "a"}] * 20}] * 900
    turns: list[dict[str, Any]] = [
        USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": results},
    ]  # fmt: skip
    assert error(agent, ask(*turns)) == "messages hold more than 16384 blocks, the limit"
    post(agent, ask())


def test_other_errors_in_its_words(agent: Server, tmp_path: Path) -> None:
    assert "does not exist" in error(agent, ask(model="other"), 404)
    assert "does not exist" in error(agent, ask(model="other"), 404, COUNT)
    assert "there is no POST" in error(agent, ask(), 404, "/v1/messages/more")
    agent.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
    assert error(agent, ask(), 500) == "a step failed"
    found = events(agent.request("POST", PATH, ask(stream=True))[2])
    assert found[-1] == ("error", found[-1][1]) and found[0][0] == "message_start"
    assert found[-1][1]["error"] == {"type": "api_error", "message": "a step failed"}
    agent.engine.room = 0
    status, headers, reply = agent.request("POST", PATH, ask())
    agent.engine.room = None
    assert (status, headers["Retry-After"]) == (429, "7")
    assert json.loads(reply)["error"]["type"] == "rate_limit_error"
    status, _, reply = agent.request("POST", PATH, b"{", {"Content-Type": "text/plain"})
    assert status == 400 and json.loads(reply)["type"] == "error"


def test_keys_and_probes(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, api_keys=("secret",)) as server:
        server.play("Hi")
        for headers, expected in (
            ({}, 401), ({"x-api-key": "secret"}, 200), ({"x-api-key": "other"}, 401),
            ({"Authorization": "Bearer secret"}, 200),
        ):  # fmt: skip
            status, _, reply = server.request("POST", f"{PATH}?beta=true", ask(), headers)
            assert status == expected
            if status == 401:
                assert json.loads(reply)["error"]["type"] == "authentication_error"
        assert server.request("HEAD", "/api/hello", headers={"x-api-key": "secret"})[0] == 404
        server.state.status = "starting"
        status, headers, reply = server.request(
            "POST", PATH, ask(), {"x-api-key": "secret", "anthropic-version": "2023-06-01"}
        )
        assert status == 503 and headers["Retry-After"]
        assert json.loads(reply)["error"]["type"] == "overloaded_error"
        server.state.status = "ready"
