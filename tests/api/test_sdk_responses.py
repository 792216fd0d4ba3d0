"""The unmodified OpenAI SDK and its checks of a stream, on /v1/responses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from pyserve.errors import EngineError
from tests.api.fakes import MODEL, Script, Server, run_server
from tests.api.tool_talk import CALL, OF_TOOLS, SECOND, with_template
from tests.waiting import wait_until

TOOLS: Any = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False},
    {"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": False},
]
SAID = f"<think>So it is.</think>Hello 😀 {CALL}{SECOND}"


class City(BaseModel):
    name: str


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = with_template(tmp_path_factory.mktemp("sdk") / "tiny", OF_TOOLS)
    with run_server(
        folder, enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3"
    ) as server:
        yield server


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "hi", **fields}


def test_create_and_go_on(talking: Server) -> None:
    talking.play("Hello world")
    with talking.sdk() as sdk:
        first = sdk.responses.create(**ask(metadata={"a": "b"}))
        assert (first.output_text, first.status, first.metadata) == (
            "Hello world", "completed", {"a": "b"},
        )  # fmt: skip
        assert first.usage is not None and first.usage.input_tokens_details.cached_tokens == 0
        second = sdk.responses.create(**ask(previous_response_id=first.id))
        assert sdk.responses.retrieve(second.id) == second
        items = list(sdk.responses.input_items.list(second.id))
        assert [item.type for item in items] == ["message"]
        counted = sdk.responses.input_tokens.count(model=MODEL, input="hi")
        assert counted.input_tokens == first.usage.input_tokens
        sdk.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(first.id)


def test_calls_are_sent_back(talking: Server) -> None:
    talking.play(SAID)
    with talking.sdk() as sdk:
        answer = sdk.responses.create(**ask(tools=TOOLS))
        assert [item.type for item in answer.output] == [
            "reasoning", "message", "function_call", "function_call",
        ]  # fmt: skip
        results = [{"type": "function_call_output", "call_id": item.call_id, "output": "1"}
                   for item in answer.output if item.type == "function_call"]  # fmt: skip
        history: Any = [{"role": "user", "content": "hi"}, *answer.output, *results]
        talking.play("Hello")
        again = sdk.responses.create(**{**ask(), "input": history})
        assert again.output_text == "Hello"


def test_the_stream_helper(talking: Server) -> None:
    talking.play(SAID)
    with talking.sdk() as sdk, sdk.responses.stream(**ask(tools=TOOLS)) as events:
        kinds = [event.type for event in events]
        final = events.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output_text == "Hello 😀"
    calls = [item for item in final.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["get_weather", "now"]


def test_parse(talking: Server) -> None:
    talking.play('<think>x</think>{"name": "Paris"}')
    with talking.sdk() as sdk:
        parsed = sdk.responses.parse(**ask(), text_format=City)
        assert parsed.output_parsed == City(name="Paris")
        with sdk.responses.stream(**ask(), text_format=City) as events:
            for _ in events:
                pass
            assert events.get_final_response().output_parsed == City(name="Paris")


def test_errors(talking: Server) -> None:
    with talking.sdk() as sdk:
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.responses.create(**ask(temperature=9))
        assert caught.value.param == "temperature"
        talking.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
        with pytest.raises(openai.InternalServerError, match="a step failed"):
            sdk.responses.create(**ask())
        with pytest.raises(openai.APIError, match="a step failed"):
            list(sdk.responses.create(**ask(stream=True)))


def test_the_background(talking: Server) -> None:
    with talking.sdk() as sdk:
        talking.play("Hello world", delay_s=0.002)
        name = sdk.responses.create(**ask(background=True)).id
        wait_until(lambda: sdk.responses.retrieve(name).status == "completed")
        assert sdk.responses.retrieve(name).output_text == "Hello world"
        streamed = list(sdk.responses.create(**ask(background=True, stream=True)))
        name = streamed[0].response.id
        again = list(sdk.responses.retrieve(name, stream=True, starting_after=3))
        assert again == streamed[4:]
        talking.play("Hello", eos=False, delay_s=0.01)
        name = sdk.responses.create(**ask(background=True)).id
        assert sdk.responses.cancel(name).status == "cancelled"
        assert not talking.engine.running()


def test_async_side_by_side(talking: Server) -> None:
    talking.play("Hello world", delay_s=0.001)

    async def run_one(sdk: AsyncOpenAI, is_streamed: bool) -> str:
        if not is_streamed:
            return (await sdk.responses.create(**ask())).output_text
        events = await sdk.responses.create(**ask(stream=True))
        return "".join([e.delta async for e in events if e.type == "response.output_text.delta"])

    async def run() -> list[str]:
        url = f"http://127.0.0.1:{talking.port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as sdk:
            return await asyncio.gather(*(run_one(sdk, i % 2 == 0) for i in range(32)))

    assert asyncio.run(run()) == ["Hello world"] * 32
