"""Keywords that the engine does not read: what passes is valid, and what is valid passes."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import JsonSchema, compile_grammar
from tests.text.grammars import allowed, text_of, vocabulary

COLOURS = {"type": "string", "enum": ["red", "green", "blue"]}
INTEGER, STRING = {"type": "integer"}, {"type": "string"}
DEFINED = {"$defs": {"Colour": {**COLOURS, "title": "Colour"}}}
REFERENCE = {"$ref": "#/$defs/Colour"}
EIGHT = {"enum": list("abcdefgh")}


def unique(**fields: Any) -> dict[str, Any]:
    return {"type": "array", "uniqueItems": True, **fields}


def an_object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", **fields}


def one_of(*names: str) -> list[Any]:
    return [{"required": [name]} for name in names]


LISTS: list[Any] = [
    [], ["red"], ["red", "red"], ["blue", "red"], ["red", "green", "blue"], ["pink"],
    ["blue", "green", "blue"],
]  # fmt: skip
OBJECTS: list[Any] = [{}, {"red": 1}, {"blue": 1, "red": 2}, {"red": "x"}, {"pink": 1}, {"redd": 1}]
CHOICES: list[Any] = [{}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"c": 1}, {"a": 1, "c": 1}]
ENFORCED: list[tuple[Any, list[Any]]] = [
    (unique(items=COLOURS), LISTS),
    (unique(items=COLOURS, minItems=2, maxItems=2), LISTS),
    (unique(items={"anyOf": [COLOURS]}, maxItems=1), LISTS),
    (unique(items=EIGHT, maxItems=3), [["a", "h", "c"], ["a", "h", "a"], list("abcd")]),
    ({**unique(items=REFERENCE), **DEFINED}, LISTS),
    (an_object(properties={"c": unique(items=REFERENCE)}, required=["c"], **DEFINED),
     [{"c": one} for one in LISTS]),
    (unique(items={"type": "boolean"}), [[], [True], [True, False], [True, True], [1]]),
    (unique(items={"enum": [1, "1", True, None, 1]}), [[True, 1], ["1", 1], [1, 1], [None, None]]),
    (unique(items={"type": "string", "enum": ["a", 1]}), [["a"], [1], ["a", "a"]]),
    (unique(items={"const": 5}), [[], [5], [5, 5]]),
    ({"type": "array", "items": STRING, "uniqueItems": False}, [["a", "a"], [1]]),
    (an_object(propertyNames=COLOURS, additionalProperties=INTEGER), OBJECTS),
    (an_object(propertyNames=REFERENCE, additionalProperties=INTEGER, **DEFINED), OBJECTS),
    (an_object(propertyNames=COLOURS), OBJECTS),
    (an_object(propertyNames={"pattern": "^r"}, minProperties=1), OBJECTS),
    (an_object(propertyNames={"enum": ["a.b", "c[d]", "e f", "g-h/"]}),
     [{"a.b": 1}, {"axb": 1}, {"c[d]": 1}, {"cd": 1}, {"e f": 1}, {"g-h/": 1}]),
    (an_object(oneOf=one_of("a", "b")), CHOICES),
    (an_object(oneOf=one_of("a", "b", "c")), CHOICES),
    (an_object(properties={"a": INTEGER, "b": INTEGER, "c": INTEGER}, additionalProperties=False,
               oneOf=one_of("a", "b")), CHOICES),
    (an_object(patternProperties={"^r": INTEGER, "e$": INTEGER}, additionalProperties=False),
     OBJECTS),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "values"), ENFORCED, ids=lambda v: json.dumps(v)[:60])
def test_what_passes_is_what_is_valid(schema: Any, values: list[Any]) -> None:
    vocab = vocabulary()
    compiled = compile_grammar(JsonSchema(param="s", schema=schema), vocab)
    validator = jsonschema.Draft202012Validator(schema)
    for value in values:
        constraint = compiled.constraint()
        constraint.accept(vocab.tokenizer.encode_inner(json.dumps(value)))
        has_passed = constraint.error is None and (
            constraint.is_finished or vocab.eos_token_ids[0] in allowed(constraint, vocab)
        )
        assert has_passed is validator.is_valid(value), value
    for seed in range(10):
        text = text_of(JsonSchema(param="s", schema=schema), seed)
        assert text is None or validator.is_valid(json.loads(text)), text


REFUSED: list[tuple[Any, str, str]] = [
    (unique(), "/uniqueItems", "cannot be enforced but in an array"),
    (unique(items=STRING), "/uniqueItems", "cannot be enforced but in an array"),
    (unique(items={"enum": [1.5, 2]}), "/uniqueItems", "cannot be enforced but in an array"),
    (unique(items={"enum": [[1], [2]]}), "/uniqueItems", "cannot be enforced but in an array"),
    (unique(items=COLOURS, prefixItems=[COLOURS]), "/uniqueItems", "cannot be enforced but"),
    ({"uniqueItems": True, "items": COLOURS}, "/uniqueItems", "cannot be enforced but in an array"),
    (unique(items=EIGHT), "/uniqueItems", "more than 2000 lists of different items"),
    (unique(items={"enum": list(range(9000))}, minItems=4000), "/uniqueItems", "more than 2000"),
    (unique(items=COLOURS, minItems=4), "/minItems", "there are no 4 different items"),
    ({"uniqueItems": "yes", "type": "array"}, "/uniqueItems", "cannot be enforced but in an array"),
    (an_object(propertyNames={"maxLength": 3}), "/propertyNames", "an enum or a pattern"),
    (an_object(propertyNames=INTEGER), "/propertyNames", "an enum or a pattern"),
    (an_object(propertyNames=False), "/propertyNames", "an enum or a pattern"),
    (an_object(propertyNames={"enum": [1]}), "/propertyNames", "an enum or a pattern"),
    (an_object(propertyNames=COLOURS, properties={"a": INTEGER}), "/propertyNames", "without"),
    (an_object(propertyNames={"pattern": "(?=a)"}), "/propertyNames", "lookaround"),
    (an_object(oneOf=one_of("a", "a")), "/oneOf", "its branches may hold together"),
    ({"oneOf": one_of("a", "b")}, "/oneOf", "its branches may hold together"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "/oneOf", "its branches may hold together"),
    (an_object(patternProperties={"^a": INTEGER, "b$": STRING}), "/patternProperties", "disjoint"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "pointer", "words"), REFUSED, ids=lambda v: json.dumps(v)[:60])
def test_what_cannot_be_said_is_refused(schema: Any, pointer: str, words: str) -> None:
    for inner, at in ((schema, pointer), (an_object(properties={"x": schema}), pointer)):
        with pytest.raises(InvalidRequestError) as caught:
            compile_grammar(JsonSchema(param="s", schema=inner), vocabulary())
        assert f"{at}" in caught.value.message and words in caught.value.message


def test_many_of_them_are_bounded() -> None:
    six = unique(items={"enum": list(range(6))})
    schema = an_object(properties={f"p{i}": six for i in range(200)})
    began_s = time.monotonic()
    with pytest.raises(InvalidRequestError, match="enums together have more than"):
        compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())
    assert time.monotonic() - began_s < 2
