"""The unmodified OpenAI SDK against every endpoint, sync, async and streaming."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.conftest import Server

MODEL = "pyserve-demo"
CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_models(client: OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_equals_the_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == "stop" and not any(reasons[:-1])
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )


def test_a_begun_answer_is_continued_and_echoed(client: OpenAI) -> None:
    begun: Any = {"role": "assistant", "content": "The capital of France is"}
    extra = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*CAPITAL, begun],
        temperature=0,
        max_tokens=8,
        extra_body=extra,
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("The capital of France is") and "Paris" in text


def test_completions_echo_and_truncate(client: OpenAI) -> None:
    text = "La capital de Francia es"
    shown = client.completions.create(
        model=MODEL, prompt=text, max_tokens=8, temperature=0, echo=True
    )
    assert shown.choices[0].text.startswith(text) and "París" in shown.choices[0].text
    alone = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True)
    assert alone.choices[0].text == text
    assert alone.usage is not None and alone.usage.completion_tokens == 0
    cut = client.completions.create(
        model=MODEL,
        prompt="no, no, no. " * 50 + text,
        max_tokens=1,
        extra_body={"truncate_prompt_tokens": 6},
    )
    assert cut.usage is not None and cut.usage.prompt_tokens == 6
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=text,
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"echo": True, "ignore_eos": True},
        )
    )
    assert chunks[0].choices[0].text.startswith(text)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3


def test_completions_of_every_prompt_form(client: OpenAI) -> None:
    text = "La capital de Francia es"
    one = client.completions.create(model=MODEL, prompt=text, max_tokens=8, temperature=0)
    assert "París" in one.choices[0].text
    both = client.completions.create(model=MODEL, prompt=[text, text], max_tokens=8, temperature=0)
    assert all("París" in choice.text for choice in both.choices)
    assert [choice.index for choice in both.choices] == [0, 1]
    stream = client.completions.create(
        model=MODEL, prompt=text, max_tokens=8, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in stream if c.choices) == one.choices[0].text


def test_token_id_prompts_and_tokenize_agree(server: Server, client: OpenAI) -> None:
    text = "La capital de Francia es"
    tokens = server.json("/tokenize", {"model": MODEL, "prompt": text})
    assert tokens["count"] == len(tokens["tokens"]) > 0
    back = server.json("/detokenize", {"model": MODEL, "tokens": tokens["tokens"]})
    assert text in back["prompt"]
    by_text = client.completions.create(model=MODEL, prompt=text, max_tokens=8, temperature=0)
    by_ids = client.completions.create(
        model=MODEL, prompt=tokens["tokens"], max_tokens=8, temperature=0
    )
    assert by_ids.choices[0].text == by_text.choices[0].text


def test_n_choices_share_the_prompt_and_differ(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Escribe un poema"}],
        n=3,
        seed=7,
        temperature=1.0,
        max_tokens=48,
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    again = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Escribe un poema"}],
        n=3,
        seed=7,
        temperature=1.0,
        max_tokens=48,
    )
    assert [choice.message.content for choice in again.choices] == texts


def test_cached_tokens_are_reported(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Repeat: " + "one two three four five " * 12}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert first.usage is not None and second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None and details.cached_tokens is not None
    # Full blocks of 16, and at least one token is always computed.
    assert details.cached_tokens == (second.usage.prompt_tokens - 1) // 16 * 16


def test_stop_strings_and_limits(client: OpenAI) -> None:
    plain = client.completions.create(
        model=MODEL, prompt="La capital de Francia es", max_tokens=8, temperature=0
    )
    stop = plain.choices[0].text[1:3]
    cut = client.completions.create(
        model=MODEL, prompt="La capital de Francia es", max_tokens=8, temperature=0, stop=[stop]
    )
    assert cut.choices[0].text == plain.choices[0].text.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    short = client.completions.create(
        model=MODEL, prompt="La capital de Francia es", max_tokens=2, temperature=0
    )
    assert short.usage is not None and short.usage.completion_tokens == 2
    assert short.choices[0].finish_reason == "length"


def test_errors_map_to_the_sdk_s_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=CAPITAL)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=9)
    assert caught.value.param == "temperature"


def test_async_client_runs_side_by_side(server: Server) -> None:
    async def ask(sdk: AsyncOpenAI, stream: bool) -> str:
        if not stream:
            answer = await sdk.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
            return answer.choices[0].message.content or ""
        chunks = await sdk.chat.completions.create(
            model=MODEL, messages=CAPITAL, temperature=0, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as sdk:
            return await asyncio.gather(*(ask(sdk, i % 2 == 0) for i in range(8)))

    answers = asyncio.run(run())
    assert len(set(answers)) == 1 and "Paris" in answers[0]


def test_beam_search(client: OpenAI, server: Server) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": "Why is the sky", "max_tokens": 8}
    fields["logprobs"] = 1
    more: dict[str, Any] = {"ignore_eos": True}

    def likelihood(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs))

    greedy = client.completions.create(**fields, temperature=0, extra_body=more).choices[0]
    more |= {"use_beam_search": True}
    beams = client.completions.create(**fields, n=4, extra_body=more).choices
    likelihoods = [likelihood(choice) for choice in beams]
    assert likelihoods == sorted(likelihoods, reverse=True)  # all of one length
    assert likelihoods[0] >= likelihood(greedy) - 0.05  # another batch rounds 16 bits otherwise
    assert len({choice.text for choice in beams}) == 4
    stop = beams[0].text[2:5]
    cut = client.completions.create(**fields, n=4, stop=stop, extra_body=more).choices
    ended = [choice for choice in cut if choice.finish_reason == "stop"]
    assert ended and not any(stop in choice.text for choice in cut)
    server.wait_idle()
