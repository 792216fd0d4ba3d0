"""Tools with the demo model and the real SDK: the guide's example, and the way to the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import WEATHER, Server, start_server

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
TOOLS: Any = [WEATHER]
QUESTION: Any = [{"role": "user", "content": "¿Cuál es el clima en París?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--served-model-name", MISTRAL, "--enable-auto-tool-choice"]
    log = tmp_path_factory.mktemp("tools") / "log"
    with start_server(log, *flags, "--tool-call-parser", "hermes") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as sdk:
        yield sdk


def test_the_guides_example(client: OpenAI) -> None:
    response = client.chat.completions.create(
        model=MISTRAL, messages=QUESTION, tools=TOOLS, tool_choice="auto"
    )
    choice = response.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("París", "Paris")


def test_it_streams(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": MISTRAL, "messages": QUESTION, "tools": TOOLS}
    whole = client.chat.completions.create(**fields, temperature=0).choices[0].message.tool_calls
    assert whole and whole[0].type == "function"
    name, arguments, ids, reasons = "", "", [], []
    for chunk in client.chat.completions.create(**fields, temperature=0, stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            reasons.append(choice.finish_reason)
            for piece in choice.delta.tool_calls or ():
                assert piece.index == 0 and piece.function is not None
                name += piece.function.name or ""
                arguments += piece.function.arguments or ""
                ids += [piece.id] if piece.id else []
    assert (name, arguments) == (whole[0].function.name, whole[0].function.arguments)
    assert len(ids) == 1 and len(reasons) > 4
    assert reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_result_goes_back_and_becomes_an_answer(client: OpenAI, is_streamed: bool) -> None:
    fields: dict[str, Any] = {"model": MISTRAL, "tools": TOOLS, "temperature": 0}
    message = client.chat.completions.create(messages=QUESTION, **fields).choices[0].message
    (call,) = message.tool_calls or []
    result = {"temperature": 21, "unit": "celsius", "condition": "soleado"}
    messages = [
        *QUESTION, message,
        {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)},
    ]  # fmt: skip
    answer: Any = client.chat.completions.create(messages=messages, **fields, stream=is_streamed)
    if is_streamed:
        text = "".join(c.delta.content or "" for chunk in answer for c in chunk.choices)
    else:
        assert answer.choices[0].finish_reason == "stop"
        text = answer.choices[0].message.content or ""
    assert "21" in text and "soleado" in text


def test_several_answers_call_each(client: OpenAI) -> None:
    response = client.chat.completions.create(
        model=MISTRAL, messages=QUESTION, tools=TOOLS, n=3, temperature=0.7, seed=1
    )
    ids = [call.id for choice in response.choices for call in choice.message.tool_calls or ()]
    assert len(ids) >= 2 and len(set(ids)) == len(ids)


POEM: Any = [{"role": "user", "content": "Escribe un poema"}]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("choice", ["required", "named", "strict"])
def test_calls_that_must_be_valid_are(
    client: OpenAI, choice: str, temperature: float, is_streamed: bool
) -> None:
    function = {**TOOLS[0]["function"]}
    function["parameters"] = {**function["parameters"], "additionalProperties": False}
    fields: dict[str, Any] = {"messages": POEM, "tool_choice": "required"}
    if choice == "named":
        fields["tool_choice"] = {"type": "function", "function": {"name": "get_weather"}}
    if choice == "strict":
        function["strict"] = True
        fields = {"messages": QUESTION, "tool_choice": "auto"}
    tools: Any = [{"type": "function", "function": function}]
    answer: Any = client.chat.completions.create(
        model=MISTRAL, tools=tools, max_tokens=400,
        temperature=temperature, seed=7, stream=is_streamed, **fields,
    )  # fmt: skip
    if is_streamed:
        choices = [one for chunk in answer for one in chunk.choices]
        pieces = [piece for one in choices for piece in one.delta.tool_calls or ()]
        texts = ["".join(p.function.arguments or "" for p in pieces if p.index == 0)]
        reason = choices[-1].finish_reason
    else:
        (one,) = answer.choices
        texts = [call.function.arguments for call in one.message.tool_calls]
        reason = one.finish_reason
    assert reason == ("stop" if choice == "named" else "tool_calls")
    for text in texts:
        jsonschema.validate(json.loads(text), function["parameters"])


def test_tools_that_may_not_be_called(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MISTRAL, messages=QUESTION, tools=TOOLS, tool_choice="none"
    )
    assert raw.headers["x-pyserve-ignored"] == "tools"
    message = raw.parse().choices[0].message
    assert message.content and not message.tool_calls


def test_an_unknown_tool_is_refused(client: OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_whether"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MISTRAL, messages=QUESTION, tools=TOOLS, tool_choice=choice
        )
    assert caught.value.param == "tool_choice.function.name" and "get_whether" in str(caught.value)
