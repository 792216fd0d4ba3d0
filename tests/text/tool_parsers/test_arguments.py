"""Arguments that are not one JSON object: what is written, read back, and what has no words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyserve.text.tool_parsers.arguments import (
    Form,
    UnsayableError,
    check_sayable,
    members_of,
    written_arguments,
)
from pyserve.text.tool_parsers.pythonic import PythonicParser
from pyserve.text.tool_parsers.qwen3_coder import QwenCoderParser
from tests.text.tool_parsers.answers import found_in

VALUES: dict[str, Any] = {
    "city": "São Paulo", "quoted": 'a "b" \\ \n c', "days": 2, "wind": -1.5, "is_dry": True,
    "none": None, "list": [1, "x", {"a": []}], "empty": "",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "written"),
    [("pythonic", PythonicParser.written[0]), ("qwen3_coder", QwenCoderParser.written[0])],
)
@pytest.mark.parametrize("values", [VALUES, {}])
def test_what_is_written_is_read_back(name: str, written: Any, values: dict[str, Any]) -> None:
    text = written.text([("get_weather", json.dumps(values)), ("now", "{}")])
    content, ((first, arguments), second) = found_in(name, [text])
    assert (content, first, second) == ("", "get_weather", ("now", "{}"))
    assert json.loads(arguments) == values


@pytest.mark.parametrize("text", ["not json", "[1]", '{"a": '])
def test_what_is_no_object_stays_as_it_is(text: str) -> None:
    for form in ("json", "python", "tags"):
        assert written_arguments(form, text) == text


def an_object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", **fields}


def one(schema: Any, **fields: Any) -> dict[str, Any]:
    return an_object(properties={"a": schema}, **fields)


RED = {"enum": ["red", "green"]}
SAYABLE: list[tuple[Any, str]] = [  # in tags; what the only member is
    ({"type": "string", "description": "d"}, "text"),
    ({"type": ["string", "null"]}, "text"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
    (RED, "texts"),
    ({"const": "red"}, "texts"),
    ({"type": "boolean"}, "texts"),
    ({"$ref": "#/$defs/Red"}, "texts"),
    ({"anyOf": [{"$ref": "#/$defs/Red"}, {"type": "null"}]}, "texts"),
    ({"enum": [1, "x", None]}, "texts"),
    ({"type": "integer", "minimum": 2}, "json"),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}, "json"),
    ({"$ref": "#/$defs/Point"}, "json"),
]
DEFINITIONS = {"Red": RED, "Point": an_object(properties={"x": {"type": "number"}})}


@pytest.mark.parametrize(("schema", "kind"), SAYABLE)
def test_what_a_value_may_be(schema: Any, kind: str) -> None:
    (member,) = members_of("tags", one(schema, required=["a"], **{"$defs": DEFINITIONS})) or []
    found = "text" if member.is_text else "texts" if member.texts else "json"
    assert (member.name, member.is_needed, found) == ("a", True, kind)
    if kind == "json":
        assert member.schema["$defs"] == DEFINITIONS


UNSAYABLE: list[tuple[Form, str, Any]] = [
    ("tags", "f", one({"type": "string", "maxLength": 5})),
    ("tags", "f", one({"type": "string", "format": "date"})),
    ("tags", "f", one({})),
    ("tags", "f", one(True)),
    ("tags", "f", one({"type": ["string", "integer"], "minimum": 2})),
    ("tags", "f", one({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 2}]})),
    ("tags", "f", one({"enum": ["a</parameter>b"]})),
    ("tags", "f", one({"enum": ["5", 6]})),  # a bare 5 would be the number
    ("tags", "f", one({"$ref": "#/$defs/Text"}, **{"$defs": {"Text": {"type": "string"}}})),
    ("tags", "f", one({"$ref": "#/nowhere"})),
    ("tags", "f", an_object(properties={"a>b": {"type": "string"}})),
    ("tags", "f<", one({"type": "string"})),
    ("python", "f", an_object(properties={"a-b": {"type": "string"}})),
    ("python", "f:g", one({"type": "string"})),
    ("python", "f", an_object(anyOf=[one({"type": "string"})])),
    ("python", "f", {"$ref": "#/$defs/X"}),
    ("python", "f", an_object(properties={}, required=["a"])),
    ("python", "f", an_object(additionalProperties={"type": "integer"})),
    ("python", "f", {"type": "string"}),
    # Elsewhere it would mean something else: a member's schema stands without the others.
    ("python", "f", one({"type": "array", "items": {"$ref": "#"}})),
    ("python", "f", one({"type": "array", "items": {"$ref": "#/properties/a"}})),
    ("tags", "f", one({"type": "array", "items": {"anyOf": [{"$dynamicRef": "#"}]}})),
    ("tags", "f", an_object(properties={f"a{i}": {"type": "string"} for i in range(201)})),
]


@pytest.mark.parametrize(("form", "name", "schema"), UNSAYABLE)
def test_what_has_no_words(form: Form, name: str, schema: Any) -> None:
    with pytest.raises(UnsayableError):
        check_sayable(form, name, schema)
    check_sayable("json", name, schema)


def test_any_arguments() -> None:
    assert members_of("python", {"type": "object"}) is members_of("tags", {}) is None
    assert members_of("tags", an_object(properties={})) == []
