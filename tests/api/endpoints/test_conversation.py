"""What a chat tells its template, over HTTP: flags, variables, documents, a template of its own."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.text.chat_template import ChatTemplate
from tests.api.fakes import MODEL, TEMPLATE, Server, least, run_server
from tests.text.test_turn_order import IN_TURNS

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
USER = "<|im_start|>user\nhi<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ANSWERED: Any = [*MESSAGES, {"role": "assistant", "content": "Hello wor"}]


@pytest.fixture
def server(server: Server) -> Iterator[Server]:
    """The shared one, whose template and settings a test may replace."""
    loaded, config = server.state.loaded, server.state.config
    yield server
    server.state.loaded, server.state.config = loaded, config


def use(server: Server, source: str | dict[str, str]) -> None:
    assert server.state.loaded is not None
    template = ChatTemplate(source, special_tokens={"eos_token": "<|im_end|>"})
    server.state.loaded = dataclasses.replace(server.state.loaded, chat_template=template)


def trust(server: Server) -> None:
    server.state.config = dataclasses.replace(server.state.config, trust_request_chat_template=True)


def prompt(server: Server, **fields: Any) -> tuple[str, str]:
    """The prompt that both endpoints make, as text, and what they name as ignored."""
    body = {"messages": MESSAGES, **fields}
    server.engine.submitted.clear()
    status, headers, reply = server.request("POST", CHAT, body)
    assert status == 200, reply
    _, others, tokens = server.request("POST", TOKENIZE, body)
    ids = server.engine.submitted[0].prompt
    ignored = headers.get("x-pyserve-ignored", "")
    assert json.loads(tokens)["tokens"] == ids
    assert others.get("x-pyserve-ignored", "") == ignored
    return server.tokenizer.decode(ids, skip_special_tokens=False), ignored


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, USER + OPEN),
        ({"add_generation_prompt": True}, USER + OPEN),
        ({"add_generation_prompt": False}, USER),
        ({"continue_final_message": True, "messages": ANSWERED}, USER + OPEN + "Hello wor"),
        ({"continue_final_message": True, "add_generation_prompt": False, "messages": ANSWERED},
         USER + OPEN + "Hello wor"),
        ({"continue_final_message": False, "messages": ANSWERED},
         USER + OPEN + "Hello wor<|im_end|>\n" + OPEN),
        ({"continue_final_message": True,
          "messages": [*MESSAGES, {"role": "assistant", "content": ["a"]}]},
         USER + OPEN + "a"),
    ],
)  # fmt: skip
def test_how_the_prompt_ends(server: Server, fields: dict[str, Any], text: str) -> None:
    assert prompt(server, **fields) == (text, "")


def test_both_ends_exclude_each_other(server: Server) -> None:
    flags = {"continue_final_message": True, "add_generation_prompt": True}
    for path in (CHAT, TOKENIZE):
        error = server.error(path, {"messages": ANSWERED, **flags})
        assert error["param"] == "continue_final_message" and "exclude" in error["message"]


@pytest.mark.parametrize(
    "path",
    [
        CHAT, TOKENIZE, "/v1/responses", "/v1/messages", "/v1/responses/input_tokens",
        "/v1/messages/count_tokens",
    ],
)  # fmt: skip
def test_what_was_done_to_the_order_is_said(server: Server, path: str) -> None:
    """The same in every dialect."""
    use(server, IN_TURNS)
    turns = [*MESSAGES, {"role": "system", "content": "be kind"}]
    name = "input" if path.startswith("/v1/responses") else "messages"
    fields = {"max_tokens": 8} if path == "/v1/messages" else {}
    server.engine.submitted.clear()
    status, headers, reply = server.request("POST", path, {name: turns, **fields})
    assert (status, headers.get("x-pyserve-merged")) == (200, "system, turns"), reply
    text = server.tokenizer.encode("[I]hi\n\nbe kind[/I]", add_special_tokens=False)
    if "input_tokens" in (counted := json.loads(reply)):
        assert counted["input_tokens"] == len(text)
    else:
        ids = [item.prompt for item in server.engine.submitted] or [counted["tokens"]]
        assert ids == [text]
    _, headers, _ = server.request("POST", path, {name: turns[:1], **fields})
    assert "x-pyserve-merged" not in headers


def test_a_developer_is_a_system_where_the_template_knows_none(server: Server) -> None:
    messages = [{"role": "developer", "content": "be kind"}]
    assert prompt(server, messages=messages)[0].startswith("<|im_start|>system\nbe kind")
    use(server, "{% for m in messages %}{{ m.role == 'developer' }}:{{ m.role }}{% endfor %}")
    assert prompt(server, messages=messages)[0] == "True:developer"


def test_variables_for_the_template(server: Server) -> None:
    use(
        server,
        TEMPLATE + "{{ '<think>' if enable_thinking else '' }}{{ (style.words or '') | tojson }}",
    )
    kwargs = {"enable_thinking": True, "style": {"words": ["a", {"b": 1}]}}
    assert prompt(server, chat_template_kwargs=kwargs) == (
        USER + OPEN + '<think>["a", {"b": 1}]', "",
    )  # fmt: skip
    text, ignored = prompt(server, chat_template_kwargs={"style": {}, "x": 1, "y": None})
    assert ignored == "chat_template_kwargs.x, chat_template_kwargs.y"
    assert text == USER + OPEN + '""'
    assert prompt(server, chat_template_kwargs={"style": {}})[1] == ""


SHOWN = "{{ reasoning_effort }}|{{ enable_thinking }}"


@pytest.mark.parametrize(
    ("source", "fields", "shown", "ignored"),
    [
        ("{{ reasoning_effort }}", {"reasoning_effort": "low"}, "low", ""),
        ("{{ enable_thinking }}", {"reasoning_effort": "high"}, "True", ""),
        ("{{ enable_thinking }}", {"reasoning_effort": "none"}, "False", ""),
        (SHOWN, {"reasoning_effort": "minimal"}, "minimal|True", ""),
        ("x", {"reasoning_effort": "medium"}, "x", "reasoning_effort"),
        ("x", {"reasoning_effort": None}, "x", ""),
        (SHOWN, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": 5}},
         "none|5", ""),
        ("{{ enable_thinking }}",
         {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
         "True", "reasoning_effort"),
        ("x", {"reasoning_effort": "max", "chat_template_kwargs": {"enable_thinking": True}},
         "x", "chat_template_kwargs.enable_thinking, reasoning_effort"),
    ],
)  # fmt: skip
def test_reasoning_effort_is_two_variables(
    server: Server, source: str, fields: dict[str, Any], shown: str, ignored: str
) -> None:
    """As in vLLM; a template that looks at neither is told of by name."""
    use(server, source)
    assert prompt(server, **fields) == (shown, ignored)


def test_an_effort_that_nobody_knows(server: Server) -> None:
    for effort in ("", "hard", "x" * 500):
        error = server.error(CHAT, {"messages": MESSAGES, "reasoning_effort": effort})
        assert error["param"] == "reasoning_effort" and "none, minimal, low" in error["message"]
        assert len(error["message"]) < 200
    _, headers, _ = server.request("POST", TOKENIZE, {"prompt": "x", "reasoning_effort": "low"})
    assert headers["x-pyserve-ignored"] == "reasoning_effort"


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
     "chat_template", "eos_token", "range", "raise_exception"],
)  # fmt: skip
def test_reserved_names(server: Server, name: str) -> None:
    use(server, TEMPLATE)
    for path in (CHAT, TOKENIZE):
        error = server.error(path, {"messages": MESSAGES, "chat_template_kwargs": {name: []}})
        assert error["param"] == "chat_template_kwargs" and name in error["message"]


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"chat_template_kwargs": {str(i): 1 for i in range(65)}}, "chat_template_kwargs", "64"),
    ({"chat_template_kwargs": {"a": "x" * 65537}}, "chat_template_kwargs", "65536"),
    ({"chat_template_kwargs": {"x" * 65537: 1}}, "chat_template_kwargs", "65536"),
    ({"chat_template_kwargs": {"a": [1] * 40_000}}, "chat_template_kwargs", "65536"),
    ({"chat_template_kwargs": {"a": nested(16)}}, "chat_template_kwargs", "deeper than 16"),
    ({"chat_template_kwargs": {"a": 10**2000}}, "chat_template_kwargs", "64 bits"),
    ({"documents": [{"a": [-(2**63) - 1]}]}, "documents", "64 bits"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "expected object"),
    ({"documents": ["x"] * 1025}, "documents", "1024"),
    ({"documents": [nested(17)]}, "documents", "deeper than 16"),
    ({"documents": [{"a": "b"}]}, "documents", "does not show documents"),
    ({"documents": [5]}, "documents[0]", "expected"),
    ({"chat_template": "{{ messages }}"}, "chat_template", "--trust-request-chat-template"),
    ({"chat_template": ""}, "chat_template", "--trust-request-chat-template"),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
def test_refusals(
    server: Server, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = server.error(path, {"messages": MESSAGES, **fields})
    assert error["param"] == param and words in error["message"]
    assert server.engine.submitted == []


def test_deep_enough_is_not_too_deep(server: Server) -> None:
    use(server, "{{ a | tojson }}")
    assert prompt(server, chat_template_kwargs={"a": nested(15)})[0].startswith('{"a": [{"a"')


def test_documents(server: Server) -> None:
    use(
        server,
        "{% for d in documents or [] %}{{ d.title }}={{ d['text'] }};{% endfor %}"
        "{{ messages[0].content }}",
    )
    documents = [{"title": "T", "text": "x<|im_end|>"}, {"title": "U", "text": "y"}]
    assert prompt(server, documents=documents) == ("T=x<|im_end|>;U=y;hi", "")
    assert prompt(server, documents=[])[0] == "hi"


def test_names_are_named_where_no_template_shows_them(server: Server) -> None:
    messages = [{"role": "user", "content": "hi", "name": "joe"}]
    assert prompt(server, messages=messages) == (USER + OPEN, "messages.name")
    use(server, "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}")
    assert prompt(server, messages=messages) == ("joe: hi", "")
    of_tools = "{% for t in tools or [] %}{{ t.name }}{% endfor %}{{ messages[0].content }}"
    use(server, of_tools)
    assert prompt(server, messages=messages) == ("hi", "messages.name")


def test_what_the_server_says_of_every_chat(server: Server) -> None:
    use(server, SHOWN + "|{{ a }}")
    server.state.config = dataclasses.replace(
        server.state.config, default_chat_template_kwargs={"enable_thinking": False, "a": 1}
    )
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "|False|1"),
        ({"chat_template_kwargs": {"a": 2}}, "|False|2"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "|True|1"),
        ({"reasoning_effort": "high"}, "high|True|1"),
        ({"reasoning_effort": "none"}, "none|False|1"),
    )
    for fields, text in cases:
        assert prompt(server, **fields) == (text, "")


def test_earlier_thinking_reaches_the_template(server: Server) -> None:
    answers = [
        {"role": "assistant", "content": "a", "reasoning": "r1"},
        {"role": "assistant", "content": "b", "reasoning_content": "r2"},
        {"role": "assistant", "content": "c", "reasoning": "r3", "reasoning_content": "r3"},
        {"role": "assistant", "content": "d", "reasoning": None},
    ]
    messages = [*answers, {"role": "user", "content": "hi"}]
    names = "messages.reasoning, messages.reasoning_content"
    assert prompt(server, messages=messages)[1] == names
    use(server, "{% for m in messages %}{{ m.reasoning_content }}:{{ m.content }} {% endfor %}")
    assert prompt(server, messages=messages) == ("r1:a r2:b r3:c :d :hi ", "")
    messages[-1] = {"role": "user", "content": "hi", "reasoning": "forged"}
    assert prompt(server, messages=messages) == ("r1:a r2:b r3:c :d :hi ", "messages.reasoning")


def test_earlier_thinking_is_measured(server: Server) -> None:
    long = [{"role": "assistant", "content": "a", "reasoning": "x" * 2_000_000}]
    error = server.error(CHAT, {"messages": [*long, *MESSAGES]})
    assert error["param"] == "messages" and "2000" in error["message"]


def test_parts_are_joined_for_a_template_that_wants_text(server: Server) -> None:
    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": parts}]
    text, _ = prompt(server, messages=messages)
    assert (
        text == "<|im_start|>system\nbe\nkind<|im_end|>\n" + USER.replace("hi", "be\nkind") + OPEN
    )
    use(
        server,
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '!' }}{% else %}"
        "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}",
    )
    assert prompt(server, messages=messages)[0] == "be\nkind!<be><kind>"
    assert prompt(server)[0] == "<hi>"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"rag": "x", "other": "y"}, "no template is named default, only other, rag"),
        ("{{ messages | xmlattr }}", "No filter named 'xmlattr'"),
        ("{% if messages %}{{ messages | xmlattr }}{% endif %}", "No filter named 'xmlattr'"),
        ("{% if %}", "not a valid chat template"),
    ],
)
def test_a_broken_template_stops_chats_alone(
    server: Server, source: str | dict[str, str], words: str
) -> None:
    use(server, source)
    for path in (CHAT, TOKENIZE):
        error = server.error(path, {"messages": MESSAGES}, status=500)
        assert words in error["message"] and "chat template" in error["message"]
    assert server.request("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 1})[0] == 200
    assert server.request("POST", TOKENIZE, {"prompt": "hi"})[0] == 200
    trust(server)
    assert prompt(server, chat_template="own {{ messages[0].content }}")[0] == "own hi"


def test_a_template_of_the_request(server: Server) -> None:
    trust(server)
    own = "{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}{{ k }}"
    text, ignored = prompt(server, chat_template=own, chat_template_kwargs={"k": "K", "x": 1})
    assert (text, ignored) == ("[hi]<|im_end|>K", "chat_template_kwargs.x")
    assert prompt(server)[0] == USER + OPEN
    for source, words in (
        ("{% if %}", "line 1"),
        ("{{ x", "line 1"),
        ("x" * 65537, "65536"),
        ("{{ raise_exception('no, thanks') }}", "no, thanks"),
        ("{{ 'a' * 10**9 }}", "makes a value of more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "too deeply"),
        ("{{ messages[0].content.__class__.x }}", "cannot render"),
    ):
        for path in (CHAT, TOKENIZE):
            error = server.error(path, {"messages": MESSAGES, "chat_template": source})
            assert error["param"] in ("chat_template", "messages"), error
            assert words in error["message"]


def test_control_tokens_of_users_stay_text_in_any_template(server: Server) -> None:
    trust(server)
    end = server.tokenizer.token_to_id("<|im_end|>")
    own = "{{ messages[0].content }}{{ k }}{{ eos_token }}"
    messages = [{"role": "user", "content": "<|im_end|>"}]
    kwargs = {"k": "<|im_end|>"}
    server.post(CHAT, {"messages": messages, "chat_template": own, "chat_template_kwargs": kwargs})
    assert end is not None and server.engine.submitted[0].prompt.count(end) == 1


def test_an_endless_template_blocks_nobody(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends in a 500 that says so; meanwhile the loop answers, and its thread is free after."""
    monkeypatch.setattr("pyserve.api.endpoints.conversation.MAX_RENDER_S", 1.0)
    use(server, ENDLESS)
    errors: list[dict[str, Any]] = []

    def ask() -> None:
        errors.append(server.error(CHAT, {"messages": MESSAGES}, status=500))

    def longest_gap_s() -> float:
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        gaps = []
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            assert server.request("GET", "/health")[0] == 200
            gaps.append(time.monotonic() - began)
        for thread in threads:
            thread.join(30)
        return max(gaps)

    assert least(longest_gap_s, 0.5) < 0.5
    assert len(errors) >= 2
    for error in errors:
        assert error["type"] == "InternalServerError"
        assert error["message"] == "the chat template takes longer than 1 s for these messages"
    assert server.engine.submitted == []
    use(server, TEMPLATE)
    assert prompt(server)[0] == USER + OPEN


def test_tokenize_shows_the_tokens(server: Server) -> None:
    answer = server.post(TOKENIZE, {"prompt": "hi you", "return_token_strs": True})
    texts = [server.tokenizer.id_to_token(token_id) for token_id in answer["tokens"]]
    assert answer["token_strs"] == texts and "".join(map(str, texts)) == "hiĠyou"
    assert answer["count"] == len(texts)
    answer = server.post(TOKENIZE, {"messages": MESSAGES, "return_token_strs": True})
    assert answer["token_strs"][0] == "<|im_start|>"
    assert server.post(TOKENIZE, {"prompt": "hi", "return_token_strs": False})["token_strs"] is None


def test_fields_of_messages_beside_a_prompt_are_named(server: Server) -> None:
    body = {"prompt": "hi", "add_generation_prompt": True, "documents": [], "chat_template": "x"}
    _, headers, _ = server.request("POST", TOKENIZE, body)
    assert headers["x-pyserve-ignored"] == "add_generation_prompt, chat_template"


def test_through_the_sdk(server: Server) -> None:
    server.play("ld")
    with server.sdk() as sdk:
        answer = sdk.chat.completions.create(
            model=MODEL, messages=ANSWERED, metadata={"a": "b"}, store=True,
            extra_body={"continue_final_message": True, "add_generation_prompt": False,
                        "echo": True},
        )  # fmt: skip
        assert answer.choices[0].message.content == "Hello world"
        assert answer.choices[0].message.role == "assistant"


def test_spelled_control_tokens_are_counted_as_what_they_become(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """120,000 of them passed for 120,000 tokens, and were then tokenised into 840,000."""
    with run_server(tokenizer_folder) as server:
        server.engine.info = dataclasses.replace(server.engine.info, max_model_len=2**17)
        num_tokens = 0
        encode = server.tokenizer.encode

        def counting(text: str, **options: Any) -> list[int]:
            nonlocal num_tokens
            token_ids = encode(text, **options)
            num_tokens += len(token_ids)
            return token_ids

        monkeypatch.setattr(server.tokenizer, "encode", counting)
        messages = [{"role": "user", "content": "<|im_end|>" * 100_000}]
        for path in ("/v1/chat/completions", "/tokenize"):
            error = server.error(path, {"messages": messages})
            assert error["param"] == "messages" and "is 131072 tokens" in error["message"]
            assert num_tokens < 1.5 * 2**17
            num_tokens = 0
        cut = {"messages": messages, "truncate_prompt_tokens": 4}
        assert server.post("/tokenize", cut)["count"] == 4
