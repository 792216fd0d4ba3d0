"""The guide's train problem by the OpenAI SDK: with its <think> parse, with --reasoning-parser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from pyserve.config import DEMO_MODEL
from tests.e2e.conftest import THINKER, WEATHER, Server, start_server

MODEL = THINKER
PROBLEM = "Resolver: Si un tren viaja 120km en 1.5 horas, ¿cuál es su velocidad en m/s?"
ASKED: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": PROBLEM}], "max_tokens": 2048,
    "temperature": 0.6,
}  # fmt: skip
GREEDY: dict[str, Any] = {**ASKED, "temperature": 0}


@contextmanager
def started(log: Path, *flags: str) -> Iterator[Server]:
    """As a user of the guide starts it, with the bundled model by the guide's name."""
    with start_server(log, "--served-model-name", MODEL, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    flags = (
        "--enable-reasoning", "--reasoning-parser", "deepseek_r1", "--enable-auto-tool-choice",
        "--tool-call-parser", "hermes",
    )  # fmt: skip
    with started(tmp_path_factory.mktemp("r1") / "log", *flags) as server, server.client() as sdk:
        yield sdk


def parse_as_the_guide(content: str) -> tuple[str, str]:
    """Thinking and answer, by the guide's two expressions."""
    found = re.search(r"<think>(.*?)</think>", content, re.DOTALL)
    thinking = found[1].strip() if found else ""
    return thinking, re.sub(r"<think>.*?</think>", "", content, flags=re.DOTALL).strip()


def streamed(client: OpenAI, **fields: Any) -> tuple[str, str, Any]:
    """Reasoning and content put together, and the usage at the end."""
    asked: Any = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    stream: Any = client.chat.completions.create(**asked)
    reasoning, content, usage = "", "", None
    for chunk in stream:
        for choice in chunk.choices:
            delta: Any = choice.delta  # the SDK keeps fields that it does not know
            piece = getattr(delta, "reasoning_content", None)
            assert piece == getattr(delta, "reasoning", None)
            assert not (piece and content), "thinking behind the answer"
            reasoning += piece or ""
            content += delta.content or ""
        usage = chunk.usage
    return reasoning, content, usage


def test_the_guide_s_own_parse_of_the_text(exact: Server) -> None:
    with exact.client() as sdk:
        content = sdk.chat.completions.create(**ASKED).choices[0].message.content
        thinking, answer = parse_as_the_guide(content)
        assert "80 km/h" in thinking and "22.2 m/s" in answer and "<" not in answer
        reasoning, content, _ = streamed(sdk, **ASKED)
        assert reasoning == "" and parse_as_the_guide(content) == (thinking, answer)


def test_the_guide_s_parse_where_the_template_opens_the_thinking(tmp_path: Path) -> None:
    """As those of DeepSeek-R1 do today: the model does not write <think> itself."""
    template = tmp_path / "opens.jinja"
    source = (DEMO_MODEL / "chat_template.jinja").read_text()
    opening = "{%- if add_generation_prompt -%}{{- '<think>\\n' -}}{%- endif -%}"
    template.write_text(source.rstrip() + opening)
    flags = ("--chat-template", str(template))
    with started(tmp_path / "log", *flags) as server, server.client() as sdk:
        content = sdk.chat.completions.create(**GREEDY).choices[0].message.content
        thinking, answer = parse_as_the_guide(content)
        assert content.count("<think>") == 1 and "80 km/h" in thinking
        assert "22.2 m/s" in answer and "<" not in answer
        assert streamed(sdk, **GREEDY)[:2] == ("", content)


def test_the_train_problem_whole_and_streamed(client: OpenAI) -> None:
    for fields in (ASKED, GREEDY):
        response = client.chat.completions.create(**fields)
        message: Any = response.choices[0].message
        assert "80 km/h" in message.reasoning and message.reasoning == message.reasoning_content
        assert parse_as_the_guide(message.content) == ("", message.content.strip())
        assert "22.2 m/s" in message.content and "think" not in message.content
        assert response.choices[0].finish_reason == "stop"
    usage = response.usage
    assert usage is not None and usage.completion_tokens_details is not None
    reasoning_tokens = usage.completion_tokens_details.reasoning_tokens
    assert reasoning_tokens is not None and 40 < reasoning_tokens < usage.completion_tokens - 5
    reasoning, content, stream_usage = streamed(client, **GREEDY)
    assert (reasoning, content) == (message.reasoning, message.content)
    assert stream_usage.completion_tokens_details == usage.completion_tokens_details


def test_thinking_that_is_cut_off(client: OpenAI) -> None:
    fields = {**GREEDY, "max_tokens": 20}
    choice = client.chat.completions.create(**fields).choices[0]
    message: Any = choice.message
    assert choice.finish_reason == "length" and message.content is None and message.reasoning
    assert streamed(client, **fields)[:2] == (message.reasoning, "")


@pytest.mark.parametrize("budget", [0, 5, 30])
def test_a_budget_ends_the_thinking(client: OpenAI, budget: int) -> None:
    full: Any = client.chat.completions.create(**GREEDY).choices[0].message
    fields = {**GREEDY, "extra_body": {"thinking_token_budget": budget}}
    response = client.chat.completions.create(**fields)
    message: Any = response.choices[0].message
    assert response.usage is not None and response.usage.completion_tokens_details is not None
    assert response.usage.completion_tokens_details.reasoning_tokens == budget
    assert full.reasoning.startswith(message.reasoning or "") and bool(message.reasoning) == bool(
        budget
    )
    assert message.content
    assert streamed(client, **fields)[:2] == (message.reasoning or "", message.content)


def test_earlier_thinking_is_part_of_the_next_prompt(client: OpenAI) -> None:
    message = client.chat.completions.create(**GREEDY).choices[0].message
    followed = [*GREEDY["messages"], message, {"role": "user", "content": "¡Gracias!"}]
    response = client.chat.completions.create(**{**GREEDY, "messages": followed})
    without = {"role": "assistant", "content": message.content}
    followed[1] = without
    other = client.chat.completions.create(**{**GREEDY, "messages": followed})
    assert response.usage is not None and other.usage is not None
    assert response.usage.prompt_tokens > other.usage.prompt_tokens + 40


def test_answers_without_thinking_and_calls(client: OpenAI) -> None:
    poem = {"model": MODEL, "messages": [{"role": "user", "content": "Escribe un poema"}]}
    reasoning, content, usage = streamed(client, **poem)
    assert reasoning == "" and len(content.split()) > 10
    assert usage.completion_tokens_details.reasoning_tokens == 0
    weather: dict[str, Any] = {
        "model": MODEL, "tools": [WEATHER], "tool_choice": "auto",
        "messages": [{"role": "user", "content": "¿Cuál es el clima en París?"}],
    }  # fmt: skip
    choice = client.chat.completions.create(**weather).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call: Any = choice.message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "París"}')


@pytest.mark.parametrize("budget", [-1, 8])
def test_a_schema_holds_behind_the_thinking(client: OpenAI, budget: int) -> None:
    schema = {
        "type": "object",
        "properties": {"speed": {"type": "number"}, "unit": {"enum": ["m/s", "km/h"]}},
        "required": ["speed", "unit"],
        "additionalProperties": False,
    }
    json_schema = {"name": "answer", "schema": schema}
    fields = {
        **GREEDY, "response_format": {"type": "json_schema", "json_schema": json_schema},
        "extra_body": {"thinking_token_budget": budget},
    }  # fmt: skip
    message: Any = client.chat.completions.create(**fields).choices[0].message
    assert message.reasoning
    answer = json.loads(message.content)
    assert answer.keys() == {"speed", "unit"} and answer["unit"] in ("m/s", "km/h")
    assert streamed(client, **fields)[:2] == (message.reasoning, message.content)
    person = [{"role": "user", "content": "Extraer: John Smith, 30 años, ingeniero de software"}]
    unthought: Any = client.chat.completions.create(**{**fields, "messages": person})
    message = unthought.choices[0].message  # where nothing is thought the schema holds at once
    assert json.loads(message.content).keys() == {"speed", "unit"}
