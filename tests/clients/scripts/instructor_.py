"""instructor: a schema by a tool call, by JSON schema and by JSON mode."""

import instructor
from checks import API_KEY, BASE_URL, CAPITAL, MODEL, PERSON, is_john, is_paris, main
from openai import OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """The person."""

    name: str
    age: int
    occupation: str


def extract(mode):
    with OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0) as sdk:
        client = instructor.from_openai(sdk, mode=mode)
        person = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": PERSON}], response_model=Person,
            temperature=0, max_tokens=100, max_retries=0,
        )  # fmt: skip
    is_john(person.name, person.age)


def chat():
    with OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0) as sdk:
        client = instructor.from_openai(sdk)
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": CAPITAL}], response_model=None,
            temperature=0, max_tokens=100,
        )  # fmt: skip
    is_paris(answer.choices[0].message.content)


def tools():
    extract(instructor.Mode.TOOLS)


def json_schema():
    extract(instructor.Mode.JSON_SCHEMA)


main(chat, tools, json_schema)
