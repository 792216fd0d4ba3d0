"""The openai package: plain, streamed, parsed, with tools."""

import json

from checks import (
    API_KEY,
    BASE_URL,
    CAPITAL,
    MODEL,
    PERSON,
    WEATHER,
    WEATHER_TOOL,
    is_john,
    is_paris,
    main,
)
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)


class Person(BaseModel):
    name: str
    age: int
    occupation: str


def ask(text, **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=100, **options
    )


def chat():
    response = ask(CAPITAL)
    is_paris(response.choices[0].message.content)
    assert response.usage.completion_tokens > 0


def stream():
    frames = list(ask(CAPITAL, stream=True, stream_options={"include_usage": True}))
    text = "".join(f.choices[0].delta.content or "" for f in frames if f.choices)
    assert text == ask(CAPITAL).choices[0].message.content
    assert frames[-1].usage.total_tokens > 0


def completions():
    response = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=5, temperature=0
    )
    is_paris(response.choices[0].text)


def models():
    assert MODEL in [model.id for model in client.models.list()]


def tools():
    messages = [{"role": "user", "content": WEATHER}]
    first = ask(WEATHER, tools=[WEATHER_TOOL])
    message = first.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert first.choices[0].finish_reason == "tool_calls"
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 18}'},
    ]
    last = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER_TOOL], temperature=0, max_tokens=100
    )
    assert "18" in last.choices[0].message.content


def tools_stream():
    frames = list(ask(WEATHER, tools=[WEATHER_TOOL], stream=True))
    pieces = [c for f in frames if f.choices for c in f.choices[0].delta.tool_calls or []]
    assert pieces[0].id and pieces[0].function.name == "get_weather"
    arguments = "".join(piece.function.arguments or "" for piece in pieces)
    assert json.loads(arguments) == {"city": "Paris"}


def parse():
    messages = [{"role": "user", "content": PERSON}]
    response = client.chat.completions.parse(
        model=MODEL, messages=messages, response_format=Person, temperature=0, max_tokens=100
    )
    person = response.choices[0].message.parsed
    is_john(person.name, person.age)


main(chat, stream, completions, models, tools, tools_stream, parse)
