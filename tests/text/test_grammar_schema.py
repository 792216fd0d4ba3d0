from __future__ import annotations

import gc
import json
from typing import Any

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import JsonSchema, compile_grammar
from pyserve.text.grammar_numbers import MAX_ITEMS, MAX_LENGTH
from pyserve.text.grammar_schema import (
    MAX_DEPTH,
    MAX_OPTIONAL,
    MAX_VALUES,
    engine_schema,
)
from tests.text.grammars import text_of, vocabulary


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def branching(depth: int) -> dict[str, Any]:
    """What the engine would take minutes and gigabytes for."""
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        branches = [{"anyOf": [{"required": [c]}, {"properties": {c: False}}]} for c in "abcd"]
        schema = {"type": "object", "properties": {"x": schema, "y": {}}, "allOf": branches}
    return schema


REFUSED: list[tuple[Any, str, str]] = [
    ({"type": "array", "uniqueItems": True}, "/uniqueItems", "cannot be enforced"),
    ({"properties": {"a/b": {"contains": False}}}, "/properties/a~1b/contains",
     "cannot be enforced"),
    ({"if": {"minimum": 1}, "then": {}}, "/if", "cannot be enforced"),
    ({"items": [{"contains": {"type": "null"}}]}, "/items/0/contains", "cannot be enforced"),
    ({"propertyNames": False}, "/propertyNames", "cannot be enforced"),
    ({"dependentRequired": {"a": ["b"]}}, "/dependentRequired", "cannot be enforced"),
    ({"unevaluatedProperties": {}}, "/unevaluatedProperties", "cannot be enforced"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"allOf": [{"not": 1}]}}}, "/$defs/x/allOf/0/not",
     "cannot be enforced"),
    ({"$ref": "#/$defs/x"}, "/$ref", "nothing at"),
    ({"$ref": "https://example.org/x"}, "/$ref", "must point into this schema"),
    ({"$ref": "file:///etc/passwd"}, "/$ref", "must point into this schema"),
    ({"$ref": 7}, "/$ref", "must be a string"),
    ({"$ref": "#/a/-1", "a": [{}]}, "/$ref", "nothing at"),
    ({"$ref": "#/a/x", "a": "x"}, "/$ref", "nothing at"),
    ({"type": "strin"}, "/type", "must be one or several of"),
    ({"type": []}, "/type", "must be one or several of"),
    ({"type": [["string"]]}, "/type", "must be one or several of"),
    ({"enum": []}, "/enum", "must be a list of values"),
    ({"enum": [2**53 + 1]}, "/enum", "within 2**53"),
    ({"const": {"a": [-1e300]}}, "/const", "within 2**53"),
    ({"enum": list(range(MAX_VALUES + 1))}, "/enum", f"more than {MAX_VALUES} values"),
    ({"type": "integer", "minimum": 1e300}, "/minimum", "within 2**53"),
    ({"type": "integer", "maximum": 2**64 - 1}, "/maximum", "within 2**53"),
    ({"type": "number", "maximum": 2**63 - 1}, "/maximum", "within 2**53"),
    ({"exclusiveMaximum": "3"}, "/exclusiveMaximum", "must be a number"),
    ({"multipleOf": 0}, "/multipleOf", "must be above 0"),
    ({"multipleOf": 99991}, "/multipleOf", "must be above 0"),
    ({"allOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, "", "several multipleOf"),
    ({"minLength": -1}, "/minLength", "whole number"),
    ({"maxLength": MAX_LENGTH + 1}, "/maxLength", "whole number"),
    ({"maxItems": 1.5}, "/maxItems", "whole number"),
    ({"minItems": MAX_ITEMS + 1}, "/minItems", "whole number"),
    ({"minProperties": 2}, "/minProperties", "above 1 cannot be enforced"),
    ({"pattern": "(?=a)"}, "/pattern", "(?=a"),
    ({"pattern": r"\bword"}, "/pattern", r"\b cannot be enforced"),
    ({"pattern": r"(a)\1"}, "/pattern", r"\1 cannot be enforced"),
    ({"patternProperties": {"(a": {}}}, "/patternProperties/(a", "is not closed"),
    ({"pattern": 3}, "/pattern", "must be a string"),
    ({"format": "iri"}, "/format", "must be one of"),
    ({"type": ["string", "null"], "format": "regex"}, "/format", "must be one of"),
    ({"required": "a"}, "/required", "list of different names"),
    ({"required": [f"p{i}" for i in range(2001)]}, "/required", "2001 properties, the limit is"),
    ({"properties": []}, "/properties", "must be an object of schemas"),
    ({"properties": {"a": 1}}, "/properties/a", "must be an object or a boolean"),
    ({"properties": {f"p{i}": {} for i in range(MAX_OPTIONAL + 1)}}, "/properties", "the limit is"),
    ({"allOf": []}, "/allOf", "must be a list of schemas"),
    ({"allOf": [{"pattern": c} for c in "abcdefghijklm"]}, "", "13 patterns may meet"),
    ({"allOf": [{"properties": {"a": {"pattern": c}}} for c in "abcdefghijklm"]}, "",
     "13 patterns may meet"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "/prefixItems",
     "not a word of this schema's draft"),
    (branching(5), "", "more than 200000 combinations"),
    ({"$ref": "#/$defs/a", "$defs": {"a": branching(5)}}, "", "more than 200000 combinations"),
    (nested(MAX_DEPTH + 1), "/items" * (MAX_DEPTH + 1), "nested deeper"),
    ({"properties": {"a": {"$id": "https://example.org/a"}}}, "/properties/a/$id", "outermost"),
    ({"$ref": "#"}, "", "no finite value"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "",
     "no finite value"),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}, "",
     "no finite value"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "", "no finite value"),
    (False, "", "false allows nothing"),
    ([], "", "must be an object or a boolean"),
    ("{}", "", "must be an object or a boolean"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "pointer", "reason"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_pointer(
    schema: Any, pointer: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine_schema(schema, param="the_field")
    assert caught.value.param == "the_field"
    message = str(caught.value)
    assert message.startswith(f"the_field at {pointer}: " if pointer else "the_field: "), message
    assert reason in message


def test_a_pattern_may_stand_in_both_halves_of_an_all_of() -> None:
    """Twelve in each of two properties do not meet."""
    halves = [{"type": "object", "properties": {name: {"pattern": "x"} for name in "abcdefghijkl"}}]
    engine_schema({"allOf": [*halves, *halves]}, param="s")


ENFORCED: list[tuple[Any, set[str]]] = [
    # Words of older drafts.
    ({"type": "array", "items": [{"const": 1}], "additionalItems": {"const": 2}, "minItems": 3,
      "maxItems": 3}, {"[1,2,2]"}),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5,
      "exclusiveMaximum": True}, {"4"}),
    ({"definitions": {"x": {"const": "y"}}, "$ref": "#/definitions/x"}, {'"y"'}),
    # References of every spelling.
    ({"$defs": {"a/b~c d": {"const": 5}}, "$ref": "#/$defs/a~1b~0c%20d"}, {"5"}),
    ({"$id": "https://example.org/s", "$defs": {"x": {"const": 5}},
      "$ref": "https://example.org/s#/$defs/x"}, {"5"}),
    ({"properties": {"a": {"const": 5}, "b": {"$ref": "#/properties/a"}}, "type": "object",
      "required": ["a", "b"], "additionalProperties": False}, {'{"a":5,"b":5}'}),
    # Siblings of a reference count.
    ({"$defs": {"x": {"enum": [1, 2, 3]}}, "$ref": "#/$defs/x", "minimum": 3}, {"3"}),
    # A bound at the end of int64 is what generators write for "no bound".
    ({"type": "integer", "minimum": 2**53, "maximum": 2**53}, {str(2**53)}),
    # Notes, and formats of what is not a string, do nothing.
    ({"type": "integer", "format": "int32", "minimum": 1, "maximum": 1, "x-order": 3,
      "default": 9}, {"1"}),
    ({"enum": ["only"], "uniqueItems": False}, {'"only"'}),
    ({"type": "object", "minProperties": 1, "properties": {"a": {"const": 1}}, "required": ["a"],
      "additionalProperties": False}, {'{"a":1}'}),
    ({"type": "array", "prefixItems": [], "maxItems": 0}, {"[]"}),
    ({"type": "object", "x-guidance": {"lenient": True}, "maxProperties": 0}, {"{}"}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "answers"), ENFORCED)
def test_what_is_enforced(schema: Any, answers: set[str]) -> None:
    spec = JsonSchema(param="s", schema=schema, whitespace="")
    assert {text_of(spec, seed) for seed in range(4)} == answers


def test_properties_that_are_not_named_may_be_ruled_out_at_once() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"const": 1}}}},
        "required": ["a"],
    }
    spec = JsonSchema(param="s", schema=schema, whitespace="", has_additional_properties=False)
    assert {text_of(spec, seed) for seed in range(8)} == {'{"a":{}}', '{"a":{"b":1}}'}


def test_one_of_with_references_is_told_apart_by_a_constant() -> None:
    """As pydantic writes a union with a discriminator."""
    kinds = {
        name: {
            "type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"],
            "additionalProperties": False,
        }
        for name in ("cat", "dog")
    }  # fmt: skip
    schema = {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": kinds,
    }
    spec = JsonSchema(param="s", schema=schema, whitespace="")
    assert {text_of(spec, seed) for seed in range(12)} == {'{"kind":"cat"}', '{"kind":"dog"}'}


REFUSED_BY_THE_ENGINE: list[tuple[Any, str, str]] = [
    ({"oneOf": [{"minLength": 1}, {"maxLength": 3}]}, " at /oneOf", "oneOf"),
    ({"properties": {"a": {"type": "array", "items": {"oneOf": [{}, {}]}}}},
     " at /properties/a/items/oneOf", "oneOf"),
    ({"$defs": {"x": {"type": "string", "pattern": "a$b"}}, "type": "object", "properties": {
        "ok": {"pattern": "^a$"}, "a": {"$ref": "#/$defs/x"}}}, " at /$defs/x/pattern", "a$b"),
    ({"anyOf": [{"type": "integer", "minimum": 2, "maximum": 1}, {"pattern": r"\p{Nonsense}"}]},
     " at /anyOf/1/pattern", "Nonsense"),
    ({"type": "array", "items": {"type": "string", "allOf": [
        {"pattern": f".*[{c}].*"} for c in "abcdefgh"]},
      "minItems": 1}, " at /items/allOf", "regex"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "", "minimum"),
    ({"patternProperties": {"a": {"type": "null"}, "b": {"type": "boolean"}}},
     " at /patternProperties", "disjoint"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "where", "reason"), REFUSED_BY_THE_ENGINE)
def test_what_the_engine_refuses_is_found(schema: Any, where: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())
    assert str(caught.value).startswith(f"s{where} cannot be enforced: "), str(caught.value)
    assert reason in str(caught.value)


def test_a_day_that_does_not_exist_is_not_a_date() -> None:
    schema = {"type": "string", "format": "date", "pattern": "^1900-02-2[89]$"}
    spec = JsonSchema(param="s", schema=schema)
    assert {text_of(spec, seed) for seed in range(6)} == {'"1900-02-28"'}


def test_white_space_has_an_end() -> None:
    spec = JsonSchema(
        param="s", schema={"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 2}
    )
    texts = [text_of(spec, seed) for seed in range(20)]
    assert any(text and any(c.isspace() for c in text) for text in texts)
    for text in texts:
        assert text is not None
        assert json.loads(text) in ([1], [1, 1])
        assert len(text) < 6 * 36


def test_a_schema_that_was_read_is_left_to_no_collector() -> None:
    """Cycles hold large schemas until its third generation, which comes rarely."""
    schema = {
        "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}}},
        "anyOf": [{"$ref": "#/$defs/a"}, {"type": "string", "pattern": "a+"}],
    }
    gc.collect()
    gc.disable()
    try:
        engine_schema(schema, param="x")
        assert gc.collect() == 0
    finally:
        gc.enable()
