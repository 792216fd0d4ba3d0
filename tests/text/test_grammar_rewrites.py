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
A_B = {"a": INTEGER, "b": INTEGER}
EIGHT = {"enum": list("abcdefgh")}


def unique(**fields: Any) -> dict[str, Any]:
    return {"type": "array", "uniqueItems": True, **fields}


def an_object(others: dict[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
    return {"type": "object", **(others or {}), **fields}


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
    # Zod writes this for every record.
    (an_object(propertyNames={"type": "string", "title": "x"}, additionalProperties=INTEGER),
     OBJECTS),
    (an_object(propertyNames={"type": "string"}, properties={"red": STRING}), OBJECTS),
    (an_object(propertyNames={"minLength": 2, "maxLength": 3}), [*OBJECTS, {"r": 1}, {"éé": 1}]),
    (an_object(propertyNames={"format": "date"}), [{}, {"2026-02-28": 1}, {"2026-02-30": 1}]),
    (an_object(propertyNames={"format": "uuid"}),
     [{}, {"f81d4fae-7dec-11d0-a765-00a0c91e6bf6": 1}, {"f81d4fae": 1}]),
    (an_object(properties={"a": {"not": {}}, "b": {"not": False}}), CHOICES),
    (an_object({"not": {"required": ["a"]}}), CHOICES),
    (an_object({"not": {"required": ["a", "b"], "type": "object"}}, properties=A_B), CHOICES),
    (an_object({"not": {"required": ["a", "b"]}}, properties=A_B, additionalProperties=False,
               required=["b"]), CHOICES),
    (an_object(dependentRequired={"a": ["b"]}), CHOICES),
    (an_object(dependentRequired={"a": ["b"], "c": [], "b": ["a"]}, properties=A_B), CHOICES),
    (an_object(dependentRequired={"a": ["b", "c"], "b": ["c"]}, properties=A_B), CHOICES),
    (an_object(dependentSchemas={"a": True, "b": {}}), CHOICES),
    (an_object(dependentSchemas={"a": {"required": ["b"]}, "c": False}, properties=A_B), CHOICES),
    (an_object(dependentSchemas={"a": {"properties": {"c": False}}}, properties=A_B), CHOICES),
    (an_object(properties=A_B, unevaluatedProperties=False), CHOICES),
    (an_object(patternProperties={"^r": INTEGER}, unevaluatedProperties=False), OBJECTS),
    (an_object(additionalProperties=INTEGER, unevaluatedProperties=False), OBJECTS),
    (an_object(unevaluatedProperties=True), OBJECTS),
    ({"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False}, [[], [1], [1, 2]]),
    ({"type": "array", "items": INTEGER, "unevaluatedItems": False}, [[], [1], [1, 2], ["a"]]),
    ({"allOf": [an_object(properties={"a": INTEGER}, unevaluatedProperties=False)]}, CHOICES),
    # Each without the other that it goes with.
    ({"type": "integer", "if": {"minimum": 5}}, [1, 6]),
    ({"type": "integer", "then": {"minimum": 5}, "else": False}, [1, 6]),
    ({"type": "array", "maxContains": 1, "minContains": 1}, [[], [1, 2]]),
    ({"type": "string", "pattern": "^(?=.*[A-Z])(?=.*\\d)[A-Za-z\\d]{3,}$"},
     ["a1B", "abc", "A1", "AB1x", "1b2", "A1-"]),
    ({"type": "string", "pattern": "^(?=a|b)(?=[)(]|..)", "maxLength": 3}, ["ab", "b", "cb", "a)"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "values"), ENFORCED, ids=lambda v: json.dumps(v)[:60])
def test_what_passes_is_what_is_valid(schema: Any, values: list[Any]) -> None:
    vocab = vocabulary()
    compiled = compile_grammar(JsonSchema(param="s", schema=schema), vocab)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for value in values:
        constraint = compiled.constraint()
        written = json.dumps(value, ensure_ascii=False)
        constraint.accept(vocab.tokenizer.encode_inner(written))
        has_passed = constraint.error is None and (
            constraint.is_finished or vocab.eos_token_ids[0] in allowed(constraint, vocab)
        )
        assert has_passed is validator.is_valid(value), value
    for seed in range(4):
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
    (an_object(propertyNames={"maxLength": -3}), "/propertyNames", "unless it is an enum"),
    (an_object(propertyNames={"maxLength": 1001}), "/propertyNames", "unless it is an enum"),
    (an_object(propertyNames={"format": "email"}), "/propertyNames", "unless it is an enum"),
    (an_object(propertyNames={"format": [1]}), "/propertyNames", "unless it is an enum"),
    (an_object(propertyNames=INTEGER), "/propertyNames", "unless it is an enum"),
    (an_object(propertyNames=False), "/propertyNames", "unless it is an enum"),
    (an_object(propertyNames={"enum": [1]}), "/propertyNames", "unless it is an enum"),
    (an_object({"not": STRING}), "/not", "not cannot be enforced"),
    (an_object({"not": {"required": []}}), "/not", "not cannot be enforced"),
    (an_object({"not": {"required": "a"}}), "/not", "not cannot be enforced"),
    (an_object({"not": {"required": ["a"], "type": "array"}}), "/not", "not cannot be enforced"),
    ({"not": {"required": ["a"]}}, "/not", "not cannot be enforced"),
    ({"not": 7}, "/not", "not cannot be enforced"),
    ({"dependentRequired": {"a": ["b"]}}, "/dependentRequired", "with the type object"),
    (an_object(dependentRequired={c: ["x"] for c in "abcde"}), "/dependentRequired", "for 4 prop"),
    (an_object(dependentRequired={"a": [1]}), "/dependentRequired", "cannot be enforced"),
    (an_object(dependentRequired=["a"]), "/dependentRequired", "cannot be enforced"),
    (an_object(dependencies={"a": [1]}), "/dependencies", "cannot be enforced"),
    (an_object(dependentSchemas={"a": ["b"]}), "/dependentSchemas", "cannot be enforced"),
    (an_object(dependentSchemas=["a"]), "/dependentSchemas", "cannot be enforced"),
    (an_object(dependentSchemas={"a": {"minLength": "b"}}), "/dependentSchemas/a/minLength",
     "must be a number"),
    ({"dependentSchemas": {"a": {"required": ["b"]}}}, "/dependentSchemas", "with the type object"),
    (an_object(dependentSchemas={c: {"required": ["x"]} for c in "abcde"}), "/dependentSchemas",
     "for 4 prop"),
    (an_object(unevaluatedProperties=INTEGER), "/unevaluatedProperties", "cannot be enforced"),
    (an_object(allOf=[{"properties": A_B}], unevaluatedProperties=False), "/unevaluatedProperties",
     "cannot be enforced"),
    ({"type": "array", "items": [INTEGER], "additionalItems": STRING, "unevaluatedItems": False},
     "/unevaluatedItems", "cannot be enforced"),
    ({"pattern": "^(?=a)b|c"}, "/pattern", "lookaround"),
    ({"pattern": "^(?=a)*b"}, "/pattern", "lookaround"),
    ({"pattern": "^(?=ab"}, "/pattern", "lookaround"),
    ({"pattern": "^a(?=b)"}, "/pattern", "lookaround"),
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
    began_s = time.thread_time()
    with pytest.raises(InvalidRequestError, match="enums together have more than"):
        compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())
    assert time.thread_time() - began_s < 2
