"""Structured outputs of the real server: what comes out is valid, however it is asked for."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import jsonschema
import msgspec
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.e2e.conftest import Server
from tests.text.hostile_grammars import makers

MODEL = "pyserve-demo"
MESSAGES: Any = [{"role": "user", "content": "John Smith is 30 years old and lives in Paris."}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


class Person(BaseModel):
    name: str
    age: int


def text_of(client: OpenAI, **fields: Any) -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=200, **fields
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    return choice.message.content or ""


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_answers_by_schema_are_valid(client: OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=FORMAT, max_tokens=300, seed=5,
        temperature=temperature, n=1 if temperature == 0 else 4,
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)


def test_a_stream_is_the_whole_in_parts(client: OpenAI) -> None:
    whole = text_of(client, response_format=FORMAT, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=FORMAT, temperature=0, max_tokens=200,
        stream=True,
    )  # fmt: skip
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == whole
    jsonschema.validate(json.loads(whole), PERSON)


def test_the_sdk_parses_into_a_type(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Person, max_tokens=300, temperature=0
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)


def test_older_and_newer_fields(client: OpenAI) -> None:
    def ask(**fields: Any) -> str:
        return text_of(client, extra_body=fields, temperature=1)

    assert ask(guided_choice=["Paris", "London"]) in ("Paris", "London")
    assert ask(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch(r"\w{3}-[0-9]{2}", ask(guided_regex=r"\w{3}-[0-9]{2}"))
    assert re.fullmatch("a{1,9}b", ask(guided_grammar='root ::= "a"{1,9} "b"'))
    assert json.loads(ask(guided_json=PERSON)).keys() == {"name", "age", "tags"}
    compact = ask(structured_outputs={"json": PERSON, "disable_any_whitespace": True})
    assert json.dumps(json.loads(compact), separators=(",", ":"), ensure_ascii=False) == compact
    tag = {"type": "tag", "begin": "<n>", "end": "</n>",
           "content": {"type": "regex", "pattern": "[0-9]{1,3}"}}  # fmt: skip
    tagged = ask(response_format={"type": "structural_tag", "format": tag})
    assert re.fullmatch("<n>[0-9]{1,3}</n>", tagged)


def test_completions_too(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["One:", "Two:"], max_tokens=50, temperature=1, n=2,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}"}},
    )  # fmt: skip
    assert len(answer.choices) == 4
    assert all(re.fullmatch("[0-9]{4}", choice.text) for choice in answer.choices)


def test_a_stop_string_still_ends_the_answer(client: OpenAI) -> None:
    text = text_of(
        client, stop=["7"], temperature=1, extra_body={"guided_regex": "[0-9]{3}7[0-9]{90}"}
    )
    assert re.fullmatch("[0-689]{0,3}", text)


def test_cut_by_its_length_it_says_so(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=FORMAT, max_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"


def test_what_cannot_be_enforced_is_a_400(client: OpenAI) -> None:
    schema = {"type": "array", "items": {"not": {"type": "string"}}}
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="at /items/not: not cannot be enforced"):
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, response_format=bad, stream=stream
            )


FIELDS = {"JsonSchema": "guided_json", "Regex": "guided_regex", "Choice": "guided_choice",
          "Grammar": "guided_grammar"}  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_what_is_meant_to_hurt_is_answered(server: Server, seed: int) -> None:
    """Each with 400 or a result, in time, while others are served."""
    for number in range(len(makers(random.Random(0)))):
        spec = makers(random.Random(f"{seed} {number}"))[number]()
        kind, value = type(spec).__name__, msgspec.to_builtins(spec)
        if kind == "Tags":
            fields = {"structured_outputs": {"structural_tag": json.dumps(value["tags"])}}
        else:
            names = ("schema", "pattern", "texts", "text")
            fields = {FIELDS[kind]: next(value[name] for name in names if name in value)}
        body = json.dumps({"prompt": "x", "max_tokens": 8, "temperature": 1, **fields}).encode()
        start = time.monotonic()
        status, reply = server.request("POST", "/v1/completions", body)
        took_s = time.monotonic() - start
        assert status in (200, 400), (status, reply[:300])
        assert took_s < 20, (took_s, body[:200])
        if status == 400:
            message = json.loads(reply)["error"]["message"]
            assert len(message) < 1200, message
            assert "Traceback" not in message and "thread" not in message, message
    assert server.get("/health")[0] == 200
