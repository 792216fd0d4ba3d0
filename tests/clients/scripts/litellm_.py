"""litellm, by its provider hosted_vllm and by that of OpenAI."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches prices from the network

import litellm
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
from pydantic import BaseModel

PROVIDERS = ("hosted_vllm", "openai")


class Person(BaseModel):
    name: str
    age: int
    occupation: str


def ask(provider, text, **options):
    return litellm.completion(
        model=f"{provider}/{MODEL}", messages=[{"role": "user", "content": text}],
        api_base=BASE_URL, api_key=API_KEY, temperature=0, max_tokens=100, num_retries=0, **options,
    )  # fmt: skip


def chat():
    for provider in PROVIDERS:
        is_paris(ask(provider, CAPITAL).choices[0].message.content)


def stream():
    for provider in PROVIDERS:
        frames = ask(provider, CAPITAL, stream=True)
        is_paris("".join(frame.choices[0].delta.content or "" for frame in frames))


def tools():
    for provider in PROVIDERS:
        (call,) = ask(provider, WEATHER, tools=[WEATHER_TOOL]).choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}


def structured():
    for provider in PROVIDERS:
        response = ask(provider, PERSON, response_format=Person)
        person = Person.model_validate_json(response.choices[0].message.content)
        is_john(person.name, person.age)


main(chat, stream, tools, structured)
