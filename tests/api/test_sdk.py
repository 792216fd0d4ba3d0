"""The unmodified OpenAI SDK, sync and async, streamed and not, against the app."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from pyserve.errors import EngineError
from tests.api.fakes import MODEL, Script, Server
from tests.waiting import wait_until

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def test_chat(server: Server) -> None:
    server.play("Hello world")
    with server.sdk() as sdk:
        answer = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, seed=5, user="me")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello world")
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert server.engine.submitted[0].params.seed == 5


def test_chat_stream(server: Server) -> None:
    server.play("Hello 😀 world")
    with server.sdk() as sdk:
        chunks = list(
            sdk.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, n=2,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    for index in range(2):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "Hello 😀 world"
        assert mine[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 2


def test_the_stream_helper(server: Server) -> None:
    server.play("Hello world")
    with (
        server.sdk() as sdk,
        sdk.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream,
    ):
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello world"


def test_lines_of_its_http_client_are_whole_frames(server: Server) -> None:
    text = "a\x85b\u2028c\u2029d"
    server.play(text, delay_s=0.001)
    with server.sdk() as sdk:
        raw = sdk.completions.with_streaming_response
        with raw.create(model=MODEL, prompt="hi", stream=True) as reply:
            lines = [line for line in reply.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    frames = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(frame["choices"][0]["text"] for frame in frames) == text


def test_completions(server: Server) -> None:
    server.play("Hello world")
    with server.sdk() as sdk:
        whole = sdk.completions.create(model=MODEL, prompt=["a", "b"], n=2, temperature=1)
        assert [choice.text for choice in whole.choices] == ["Hello world"] * 4
        stream = sdk.completions.create(
            model=MODEL, prompt=[80, 81], stream=True, extra_body={"top_k": 5, "min_p": 0.1}
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world"
    assert server.engine.submitted[-1].params.top_k == 5


def test_models(server: Server) -> None:
    with server.sdk() as sdk:
        assert [model.id for model in sdk.models.list()] == [MODEL, "alias"]
        assert sdk.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve("nobody")


def test_errors_are_the_sdk_s_classes(server: Server) -> None:
    with server.sdk() as sdk:
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
        assert (caught.value.param, caught.value.type) == ("temperature", "BadRequestError")
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.create(model="nobody", messages=MESSAGES, stream=True)
        server.engine.script = lambda number: Script([80], error=EngineError("a step failed"))
        with pytest.raises(openai.InternalServerError, match="a step failed"):
            sdk.chat.completions.create(model=MODEL, messages=MESSAGES)
        with pytest.raises(openai.APIError, match="a step failed"):
            list(sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))


def test_closing_a_stream_aborts(server: Server) -> None:
    server.play("Hello", eos=False, delay_s=0.005)
    sdk: OpenAI
    with server.sdk() as sdk:
        stream = sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: not server.engine.running())
        assert all(item.is_aborted for item in server.engine.submitted), "none has ended"


def test_async_side_by_side(server: Server) -> None:
    server.play("Hello world", delay_s=0.001)

    async def ask(sdk: AsyncOpenAI, stream: bool) -> str:
        if not stream:
            answer = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES)
            return answer.choices[0].message.content or ""
        chunks = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])

    async def run() -> list[str]:
        url = f"http://127.0.0.1:{server.port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as sdk:
            return await asyncio.gather(*(ask(sdk, i % 2 == 0) for i in range(64)))

    assert asyncio.run(run()) == ["Hello world"] * 64
