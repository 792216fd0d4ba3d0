"""A server with --reasoning-parser: thinking streamed and whole, counted, hidden, cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tests.api.fakes import TEMPLATE, Script, Server, make_tokenizer_folder, run_server
from tests.api.message_talk import events, put_together
from tests.api.response_talk import RESPONSES, built, stream
from tests.api.tool_talk import with_template

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
OPENS = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
ASKS = TEMPLATE + "{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '' }}"
USAGE = {"include_usage": True, "continuous_usage_stats": True}


@pytest.fixture(scope="module")
def server(tokenizer_folder: Path) -> Iterator[Server]:
    config: dict[str, Any] = {"reasoning_parser": "deepseek_r1"}
    with run_server(tokenizer_folder, trust_request_chat_template=True, **config) as running:
        yield running


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """[THINK] and [/THINK] are special tokens."""
    folder = make_tokenizer_folder(tmp_path_factory.mktemp("reasoning") / "special")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    tokens = [AddedToken(token, special=True) for token in ("[THINK]", "[/THINK]")]
    backend.add_special_tokens(tokens)
    backend.save(str(folder / "tokenizer.json"))
    with run_server(folder, reasoning_parser="mistral") as running:
        yield running


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **fields}


def texts(server: Server, **fields: Any) -> tuple[str | None, str | None]:
    """Reasoning and content of the whole answer, and of the stream, which must be the same."""
    whole = server.post(CHAT, ask(**fields))
    (choice,) = whole["choices"]
    message = choice["message"]
    assert message["reasoning"] == message["reasoning_content"]
    role, *frames, usage = server.frames(CHAT, ask(stream_options=USAGE, **fields))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert role["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    for delta in deltas:
        assert set(delta) in ({"content"}, {"reasoning", "reasoning_content"})
        assert delta.get("reasoning") == delta.get("reasoning_content")
    for name in ("reasoning", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == (message[name] or "")
    assert frames[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert usage["usage"] == frames[-1]["usage"] == whole["usage"]
    counts = [f["usage"]["completion_tokens_details"]["reasoning_tokens"] for f in frames]
    assert counts == sorted(counts)
    return message["reasoning"], message["content"]


def num_reasoning_tokens(server: Server, **fields: Any) -> int:
    usage = server.post(CHAT, ask(**fields))["usage"]
    count: int = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 <= count <= usage["completion_tokens"]
    return count


@pytest.mark.parametrize("burst", [1, 3, 1000])
@pytest.mark.parametrize(
    ("said", "reasoning", "content"),
    [
        ("<think>\nHello 漢\n</think>\n\nworld", "\nHello 漢\n", "\n\nworld"),
        ("<think>\n\n</think>\n\nworld", "\n\n", "\n\nworld"),
        ("<think>Hello</think>", "Hello", None),
        ("<think>Hello", "Hello", None),
        ("Hello world", None, "Hello world"),
        ("1 < 2", None, "1 < 2"),
        ("", None, ""),
    ],
)
def test_thinking_and_answer(
    server: Server, burst: int, said: str, reasoning: str | None, content: str | None
) -> None:
    server.play(said, burst=burst)
    assert texts(server) == (reasoning, content)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """No parser, and a template that opens the thinking itself, as DeepSeek-R1's do."""
    folder = with_template(tmp_path_factory.mktemp("opens") / "tiny", OPENS)
    with run_server(folder, trust_request_chat_template=True) as running:
        yield running


def shown(server: Server, **fields: Any) -> str:
    """The content of the whole answer, and of the stream, which must be the same."""
    (choice,) = server.post(CHAT, ask(**fields))["choices"]
    frames = server.frames(CHAT, ask(**fields))
    pieces = [frame["choices"][0]["delta"].get("content", "") for frame in frames]
    assert "".join(pieces) == choice["message"]["content"]
    content: str = choice["message"]["content"]
    return content


def test_without_a_parser_the_marker_of_the_template_is_shown(plain: Server) -> None:
    for burst in (1, 1000):
        plain.play("Hm.</think>Four", burst=burst)
        assert shown(plain) == "<think>\nHm.</think>Four"
        assert shown(plain, n=1, logprobs=True) == "<think>\nHm.</think>Four"
    usage = plain.post(CHAT, ask())["usage"]
    expected = plain.tokenizer.encode("Hm.</think>Four", add_special_tokens=False)
    assert usage["completion_tokens"] == len(expected) + 1  # and the one that ends it


def test_no_marker_is_shown_that_the_template_has_not_written_now(plain: Server) -> None:
    plain.play("Four")
    assert shown(plain, chat_template=TEMPLATE) == "Four"
    assert shown(plain, add_generation_prompt=False) == "Four"
    begun = [*MESSAGES, {"role": "assistant", "content": "I <think>"}]
    assert shown(plain, messages=begun, continue_final_message=True) == "Four"
    plain.play('{"a": 1}')
    answer = shown(plain, response_format={"type": "json_object"})
    assert json.loads(answer) == {"a": 1}


def test_the_tokens_of_the_thinking_are_counted(server: Server) -> None:
    def num_tokens(text: str) -> int:
        return len(server.tokenizer.encode(text, add_special_tokens=False))

    marker = num_tokens("</think>")  # of several tokens here; the last of them ends the thinking
    for burst in (1, 4, 1000):
        server.play("<think>\nHello 漢\n</think>\n\nworld", burst=burst)
        assert num_reasoning_tokens(server) == num_tokens("\nHello 漢\n") + marker - 1
        server.play("Hello world", burst=burst)
        assert num_reasoning_tokens(server) == 0
        server.play("<think>Hello", burst=burst)
        assert num_reasoning_tokens(server) == num_tokens("Hello")
    server.play("<think>Hello</think>")
    usage = server.post(CHAT, ask(n=3, temperature=1))["usage"]
    expected = 3 * (num_tokens("Hello") + marker - 1)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == expected


def test_markers_of_one_token_are_not_counted(special: Server) -> None:
    special.play("[THINK]Hello[/THINK] world")
    num_tokens = len(special.tokenizer.encode("Hello", add_special_tokens=False))
    assert num_reasoning_tokens(special) == num_tokens


def test_thinking_that_is_cut_off(server: Server) -> None:
    server.play("<think>Hello world, how are you?</think>x")
    ids = server.tokenizer.encode("<think>Hello world", add_special_tokens=False)
    assert texts(server, max_tokens=len(ids)) == ("Hello world", None)
    choice = server.post(CHAT, ask(max_tokens=len(ids)))["choices"][0]
    assert choice["finish_reason"] == "length"
    opened = server.tokenizer.encode("<think>", add_special_tokens=False)
    assert num_reasoning_tokens(server, max_tokens=len(ids)) == len(ids) - len(opened)


def test_stop_strings_end_the_thinking_too(server: Server) -> None:
    for burst in (1, 1000):
        server.play("<think>Hello world, how</think> are you", burst=burst)
        assert texts(server, stop=["world"]) == ("Hello ", None)
        assert texts(server, stop=["</think>"]) == ("Hello world, how", None)
        assert texts(server, stop=[" are"]) == ("Hello world, how", None)
        assert texts(server, stop=["you"]) == ("Hello world, how", " are ")
        assert texts(server, stop=["you"], include_stop_str_in_output=True)[1] == " are you"
        assert texts(server, stop=["think>H"]) == (None, "<")


def test_templates_that_open_and_close_the_thinking(server: Server) -> None:
    server.play("Hello</think>world")
    assert texts(server, chat_template=OPENS) == ("Hello", "world")
    assert texts(server) == (None, "Hello</think>world")
    server.play("Hello")
    assert texts(server, chat_template=OPENS) == ("Hello", None)
    server.play("<think>\nHello</think>world")
    assert texts(server, chat_template=OPENS) == ("\nHello", "world")
    server.play("Hello")
    off: dict[str, Any] = {"chat_template": ASKS}
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"},
    ):  # fmt: skip
        assert texts(server, **off, **fields) == (None, "Hello")
        assert num_reasoning_tokens(server, **off, **fields) == 0
    server.play("<think>Hello</think>world")
    for fields in ({}, {"reasoning_effort": "high"}):
        assert texts(server, **off, **fields) == ("Hello", "world")


def test_a_message_that_goes_on(server: Server) -> None:
    def go_on(text: str) -> dict[str, Any]:
        messages = [*MESSAGES, {"role": "assistant", "content": text}]
        fields = {"messages": messages, "continue_final_message": True}
        return {**fields, "add_generation_prompt": False}

    server.play(" so</think>Hello")
    assert texts(server, **go_on("<think>And")) == (" so", "Hello")
    server.play("Hello")
    assert texts(server, **go_on("<think>And</think>")) == (None, "Hello")
    server.play("<think>Hello")
    assert texts(server, **go_on("The tag is")) == (None, "<think>Hello")
    server.play(" so</think>Hello")  # what is echoed is not read again
    assert texts(server, **go_on("<think>And"), echo=True) == (" so", "<think>AndHello")


def test_earlier_thinking_in_the_prompt_means_nothing(server: Server) -> None:
    messages = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>a</think>b"},
        {"role": "user", "content": "<think>"},
    ]  # fmt: skip
    server.play("<think>Hello</think>world")
    assert texts(server, messages=messages) == ("Hello", "world")
    server.play("Hello")
    assert texts(server, messages=messages) == (None, "Hello")


def test_thinking_that_nobody_wants_to_see(server: Server) -> None:
    server.play("<think>Hello</think>world")
    shown = num_reasoning_tokens(server)
    assert texts(server, include_reasoning=False) == (None, "world")
    assert num_reasoning_tokens(server, include_reasoning=False) == shown > 0
    server.play("<think>Hello")
    assert texts(server, include_reasoning=False) == (None, "")


def test_hiding_what_is_not_told_apart_is_named(shared_server: Server, server: Server) -> None:
    for asked, value, ignored in (
        (shared_server, False, "include_reasoning"), (shared_server, True, None),
        (server, False, None), (server, True, None),
    ):  # fmt: skip
        asked.play("Hello")
        _, headers, _ = asked.request("POST", CHAT, ask(include_reasoning=value))
        assert headers.get("x-pyserve-ignored") == ignored


def test_a_server_without_a_parser_shows_it_all(shared_server: Server) -> None:
    shared_server.play("<think>Hello</think>world")
    answer = shared_server.post(CHAT, ask())
    message = answer["choices"][0]["message"]
    assert message["content"] == "<think>Hello</think>world" and message["reasoning"] is None
    assert "completion_tokens_details" not in answer["usage"]


def test_a_completion_is_text_whatever_it_holds(server: Server) -> None:
    server.play("<think>Hello</think>world")
    answer = server.post(COMPLETIONS, {"prompt": "hi", "max_tokens": 100})
    assert answer["choices"][0]["text"] == "<think>Hello</think>world"
    assert "completion_tokens_details" not in answer["usage"]


def test_choices_think_for_themselves(server: Server) -> None:
    said = ["<think>Hello</think>world", "Hello", "<think>"]
    encoded = [server.tokenizer.encode(text, add_special_tokens=False) for text in said]
    server.engine.submitted.clear()
    server.engine.script = lambda number: Script([*encoded[number % 3], 2])
    messages = [c["message"] for c in server.post(CHAT, ask(n=3, temperature=1))["choices"]]
    assert [(m["reasoning"], m["content"]) for m in messages] == [
        ("Hello", "world"), (None, "Hello"), (None, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("burst", [1, 2, 1000])
def test_markers_that_are_special_tokens(special: Server, burst: int) -> None:
    special.play("[THINK]Hello[/THINK] world[/THINK]<|im_start|>", burst=burst)
    assert texts(special) == ("Hello", " world")
    shown = (" world[/THINK]<|im_start|><|im_end|>", " world[/THINK]<|im_start|>")
    assert texts(special, skip_special_tokens=False)[1] in shown
    special.play("Hello[/THINK] world", burst=burst)
    assert texts(special) == (None, "Hello world")
    special.play("[THINK]Hello <|im_start|>world", burst=burst)
    assert texts(special) == ("Hello world", None)


@pytest.mark.parametrize("burst", [1, 1000])
def test_a_budget_closes_the_thinking(server: Server, special: Server, burst: int) -> None:
    server.play("<think>\nThe quick brown fox jumps over the lazy dog.", burst=burst)
    whole, _ = texts(server)
    for budget in (0, 3, 8):
        reasoning, content = texts(server, thinking_token_budget=budget)
        assert whole == f"{reasoning or ''}{content}" and bool(reasoning) == (budget > 0)
    assert texts(server, thinking_token_budget=500) == texts(server) == (whole, None)
    assert texts(server, thinking_token_budget=-1) == (whole, None)
    count = num_reasoning_tokens(server, thinking_token_budget=3)
    assert 3 < count < num_reasoning_tokens(server)
    special.play("[THINK]The quick brown fox jumps over the lazy dog.", burst=burst)
    reasoning, content = texts(special, thinking_token_budget=4)
    assert reasoning and content and num_reasoning_tokens(special, thinking_token_budget=4) == 4


def test_a_budget_of_every_choice_is_its_own(server: Server) -> None:
    server.play("<think>The quick brown fox jumps over the lazy dog.")
    answer = server.post(CHAT, ask(n=3, temperature=1, thinking_token_budget=5))
    messages = [choice["message"] for choice in answer["choices"]]
    assert len(messages) == 3 and messages[0]["reasoning"] and messages[0]["content"]
    assert all(message == messages[0] for message in messages)


def test_a_budget_out_of_range_or_without_thinking(server: Server, tokenizer_folder: Path) -> None:
    server.play("Hi")
    error = server.error(CHAT, ask(thinking_token_budget=-2))
    assert error["param"] == "thinking_token_budget"
    assert "must be at least 0, or -1 for none, got -2" in error["message"]
    closed = {"chat_template": ASKS, "chat_template_kwargs": {"enable_thinking": False}}
    status, headers, _ = server.request("POST", CHAT, ask(thinking_token_budget=4, **closed))
    assert status == 200 and headers["x-pyserve-ignored"] == "thinking_token_budget"
    with run_server(tokenizer_folder) as plain:
        plain.play("Hi")
        error = plain.error(CHAT, ask(thinking_token_budget=4))
        assert error["param"] == "thinking_token_budget"
        assert "--reasoning-parser" in error["message"]
        assert plain.request("POST", CHAT, ask(thinking_token_budget=-1))[0] == 200


@pytest.fixture(scope="module")
def calling(tokenizer_folder: Path) -> Iterator[Server]:
    """Thinking ends where a call begins, too."""
    config: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    config |= {"reasoning_parser": "qwen3", "trust_request_chat_template": True}
    with run_server(tokenizer_folder, **config) as running:
        yield running


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "<think>"}}\n</tool_call>'


@pytest.mark.parametrize("burst", [1, 3, 1000])
@pytest.mark.parametrize(
    ("said", "reasoning", "content", "num_calls"),
    [
        (f"<think>\nSo\n</think>\n\n{CALL}", "\nSo\n", None, 1),
        (f"<think>So</think>I see. {CALL}\n{CALL}", "So", "I see.", 2),
        (f"<think>So {CALL}", "So ", None, 1),
        (f"<think>So <tool_calls></think>{CALL}", "So <tool_calls>", None, 1),
        (CALL, None, None, 1),
        ("<think>So</think>Hi", "So", "Hi", 0),
        ("<think>So <tool_ca", "So <tool_ca", None, 0),
    ],
)
def test_thinking_before_calls(
    calling: Server, burst: int, said: str, reasoning: str | None, content: str | None,
    num_calls: int,
) -> None:  # fmt: skip
    calling.play(said, burst=burst)
    asked = ask(tools=TOOLS, chat_template=TEMPLATE + "{% if tools %}{% endif %}")
    (choice,) = calling.post(CHAT, asked)["choices"]
    message = choice["message"]
    assert (message["reasoning"], message["content"]) == (reasoning, content)
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert calls == [{"name": "f", "arguments": '{"x": "<think>"}'}] * num_calls
    assert choice["finish_reason"] == ("tool_calls" if num_calls else "stop")
    _, *frames = calling.frames(CHAT, asked)
    deltas = [frame["choices"][0]["delta"] for frame in frames]
    for name in ("reasoning", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == (message[name] or "")
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    for index, call in enumerate(calls):
        texts = [c["function"]["arguments"] for c in pieces if c["index"] == index]
        assert "".join(texts) == call["arguments"]


@pytest.mark.parametrize("burst", [1, 3, 1000])
@pytest.mark.parametrize("is_shown", [True, False])
def test_logprobs_of_thinking_and_answer(calling: Server, burst: int, is_shown: bool) -> None:
    """Each token once and in its order, streamed as whole; of hidden thinking none is told."""
    for said in (
        "<think>\nHello 漢\n</think>\n\nworld", "<think>Hello", "Hello world", f"<think>So {CALL}",
    ):  # fmt: skip
        ids = calling.play(said, burst=burst)
        fields: dict[str, Any] = {"tools": TOOLS, "chat_template": TEMPLATE + "{{ tools or '' }}"}
        asked = ask(logprobs=True, return_token_ids=True, include_reasoning=is_shown, **fields)
        (choice,) = calling.post(CHAT, asked)["choices"]
        entries = (choice["logprobs"] or {}).get("content", [])  # null where none is shown
        shown = [
            entry
            for frame in calling.frames(CHAT, asked)
            for entry in (frame["choices"][0]["logprobs"] or {}).get("content", [])
        ]
        assert shown == entries
        said_bytes = [byte for entry in entries for byte in entry["bytes"]]
        if is_shown or "<think>" not in said:
            assert len(entries) == len(ids)
            assert bytes(said_bytes).decode().removesuffix("<|im_end|>") == said
        else:
            hidden = "Hello" if "Hello" in said else "So"
            assert len(entries) < len(ids) and hidden not in bytes(said_bytes).decode()


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 30, "maximum": 30}},
    "required": ["age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


@pytest.mark.parametrize("burst", [1, 3, 1000])
@pytest.mark.parametrize("said", ["<think>Hello", "<think>", "<think>Hello </thi", "Hello"])
def test_what_would_end_within_the_thinking_is_answered(
    server: Server, burst: int, said: str
) -> None:
    thought = said.removeprefix("<think>") or None
    for fields in (
        {}, {"logprobs": True, "top_logprobs": 2}, {"chat_template": OPENS},
        {"thinking_token_budget": 100}, {"skip_special_tokens": False},
    ):  # fmt: skip
        if thought == said and "chat_template" not in fields:
            continue  # it does not think
        server.play(said, burst=burst)
        reasoning, content = texts(server, response_format=FORMAT, **fields)
        shown = f"{thought or ''}<|im_end|>" if "skip_special_tokens" in fields else thought
        if "chat_template" in fields and said.startswith("<think>"):
            shown = thought  # the template has opened it, and the model once more
        assert reasoning == shown
        assert content is not None and json.loads(content) == {"age": 30}


def test_each_choice_is_answered(server: Server) -> None:
    server.play("<think>Hello")
    answer = server.post(CHAT, ask(n=3, temperature=1, response_format=FORMAT))
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop" and choice["message"]["reasoning"] == "Hello"
        assert json.loads(choice["message"]["content"]) == {"age": 30}


def test_thinking_that_is_cut_off_has_no_answer(server: Server) -> None:
    """Within the thoughts, behind the end that is void, and within the marker that is forced."""
    num_thought = len(server.play("<think>Hello"))
    for max_tokens in range(num_thought - 1, num_thought + 3):
        fields = ask(response_format=FORMAT, max_tokens=max_tokens)
        (choice,) = server.post(CHAT, fields)["choices"]
        assert choice["finish_reason"] == "length" and choice["message"]["content"] is None
        assert choice["message"]["reasoning"].startswith("Hello")
        *_, last = server.frames(CHAT, fields)
        assert last["choices"][0]["finish_reason"] == "length"


def test_what_need_not_be_answered_may_end_there(server: Server) -> None:
    server.play("<think>Hello")
    for fields in ({}, {"structured_outputs": {"regex": "[a-z]*"}}):
        assert texts(server, **fields) == ("Hello", None)


def test_every_dialect_is_answered(server: Server) -> None:
    server.play("<think>Hello")
    named = {"type": "json_schema", "name": "person", "schema": PERSON}
    body: dict[str, Any] = {"input": "hi", "store": False, "text": {"format": named}}
    for items in (server.post(RESPONSES, body)["output"], built(stream(server, body))):
        assert [item["type"] for item in items] == ["reasoning", "message"]
        assert json.loads(items[1]["content"][0]["text"]) == {"age": 30}
    body = {
        "messages": MESSAGES, "max_tokens": 100, "thinking": {"type": "adaptive"},
        "output_config": {"format": {"type": "json_schema", "schema": PERSON}},
    }  # fmt: skip
    reply = server.request("POST", "/v1/messages", {**body, "stream": True})[2]
    for message in (server.post("/v1/messages", body), put_together(events(reply))):
        assert [block["type"] for block in message["content"]] == ["thinking", "text"]
        assert json.loads(message["content"][1]["text"]) == {"age": 30}
        assert message["stop_reason"] == "end_turn"


def test_a_call_that_is_asked_for_comes(calling: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": PERSON}}
    calling.play("Hello")
    fields: dict[str, Any] = ask(
        tools=[tool], tool_choice="required", max_tokens=200, chat_template=OPENS
    )
    message = calling.post(CHAT, fields)["choices"][0]["message"]
    assert message["reasoning"] == "Hello"
    (call,) = message["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"age": 30}
    message = calling.post(CHAT, {**fields, "tool_choice": "auto"})["choices"][0]["message"]
    assert message["reasoning"] == "Hello" and message["content"] is None
