"""Conditions and `contains`: what passes is valid, and what is valid passes."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import jsonschema
import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import Compiled, JsonSchema, compile_grammar
from tests.text.grammars import allowed, vocabulary

KIND = {"enum": ["cat", "dog", "cow"]}
INTEGER, STRING = {"type": "integer"}, {"type": "string"}
TEXT = {"type": "string", "maxLength": 6}


def an_object(others: dict[str, Any] | None = None, /, **fields: Any) -> dict[str, Any]:
    return {"type": "object", **(others or {}), **fields}


def when(condition: Any, then: Any = None, other: Any = None) -> dict[str, Any]:
    parts = {"if": condition, "then": then, "else": other}
    return {name: part for name, part in parts.items() if part is not None}


def has(**values: Any) -> dict[str, Any]:
    return {"properties": {name: {"const": value} for name, value in values.items()}}


def needs(*names: str) -> dict[str, Any]:
    return {"required": list(names)}


def an_array(**fields: Any) -> dict[str, Any]:
    return {"type": "array", **fields}


def passes(compiled: Compiled, value: Any) -> bool:
    vocab = vocabulary()
    constraint = compiled.constraint()
    constraint.accept(vocab.tokenizer.encode_inner(json.dumps(value, ensure_ascii=False)))
    return constraint.error is None and (
        constraint.is_finished or bool({*vocab.eos_token_ids} & {*allowed(constraint, vocab)})
    )


KINDS: list[Any] = ["cat", "cow", "dog"]
CLOSED = {"additionalProperties": False}
PETS = an_object(properties={"kind": KIND, "age": INTEGER, "milk": INTEGER}, required=["kind"])
FLAGS = an_object(properties={"a": {"type": "boolean"}, "b": {"type": ["null", "boolean"],
                  "enum": [None, True, False]}, "c": INTEGER})  # fmt: skip
NAMED = an_object(properties={"country": TEXT, "zip": TEXT}, required=["country"])
PET_VALUES: list[Any] = [
    dict(zip(names, values, strict=True))
    for names in (["kind"], ["kind", "age"], ["kind", "milk"], ["kind", "age", "milk"], ["age"])
    for values in itertools.product(*[KINDS if name == "kind" else [1] for name in names])
]
FLAG_VALUES: list[Any] = [
    {name: value for name, value in zip("abc", values, strict=True) if value != "-"}
    for values in itertools.product([True, False, "-"], [None, True, False, "-"], [1, "-"])
]
NAMED_VALUES: list[Any] = [
    {"country": country, **more} for country in ("US", "U", "USA", "us", "", "é", "FR", 'U"', "[^]")
    for more in ({}, {"zip": "1"})
]  # fmt: skip
ENFORCED: list[tuple[Any, list[Any]]] = [
    ({**PETS, **when(has(kind="cow"), needs("milk"))}, PET_VALUES),
    ({**PETS, **CLOSED, **when(has(kind="cow"), needs("milk"), needs("age"))}, PET_VALUES),
    ({**PETS, **when(has(kind="cow"), None, {"properties": {"milk": False}})}, PET_VALUES),
    ({**PETS, "required": [], **when(has(kind="cow"), needs("milk"), needs("age"))}, PET_VALUES),
    ({**PETS, "required": [], **when({**has(kind="cow"), **needs("kind")}, needs("milk"))},
     PET_VALUES),
    ({**PETS, **when({"properties": {"kind": {"enum": ["cow", "cat"]}}}, needs("milk"))},
     PET_VALUES),
    ({**PETS, **when(needs("age"), needs("milk"))}, PET_VALUES),
    ({**PETS, **when(has(kind="bee"), needs("milk"), needs("age"))}, PET_VALUES),
    ({**PETS, **when(True, needs("milk"), needs("age"))}, PET_VALUES),
    ({**PETS, **when(False, needs("milk"), needs("age"))}, PET_VALUES),
    ({**PETS, **when({"title": "all"}, needs("milk"), needs("age"))}, PET_VALUES),
    ({**PETS, **when({"type": "object", **has(kind="cow")}, False)}, PET_VALUES),
    # A chain, and conditions side by side, as they are written most often.
    ({**PETS, **when(has(kind="cow"), needs("milk"),
                     when(has(kind="cat"), needs("age"), {"properties": {"age": False}}))},
     PET_VALUES),
    ({**PETS, "allOf": [when(has(kind="cow"), needs("milk")), when(has(kind="cat"), needs("age"))]},
     PET_VALUES),
    ({**PETS, "anyOf": [when(has(kind="cow"), needs("milk")), needs("age")]}, PET_VALUES),
    ({"$ref": "#/$defs/pet", "$defs": {"kind": KIND, "cow": {"const": "cow"}, "pet": {
        **PETS, "properties": {**PETS["properties"], "kind": {"$ref": "#/$defs/kind"}},
        **when({"properties": {"kind": {"$ref": "#/$defs/cow"}}}, needs("milk"))}}}, PET_VALUES),
    ({**FLAGS, **when(has(a=True), needs("c"))}, FLAG_VALUES),
    ({**FLAGS, **when(has(a=True, b=None), needs("c"), {"properties": {"c": False}})}, FLAG_VALUES),
    ({**FLAGS, **when({**has(a=True, b=True), **needs("a", "b")}, needs("c"))}, FLAG_VALUES),
    ({**FLAGS, **when({"properties": {"b": {"type": "null"}}}, needs("c"))}, FLAG_VALUES),
    ({**NAMED, **when(has(country="US"), needs("zip"))}, NAMED_VALUES),
    ({**NAMED, **when({"properties": {"country": {"enum": ["US", "U", "", "[^]", 3]}}},
                      needs("zip"), {"properties": {"zip": False}})}, NAMED_VALUES),
    (an_array(items=INTEGER, contains={"const": 1}, maxItems=3),
     [list(some) for n in range(5) for some in itertools.product([1, 2], repeat=n)]),
    (an_array(items=INTEGER, contains={"const": 1}, maxItems=4, minContains=2),
     [list(some) for n in range(5) for some in itertools.product([1, 2], repeat=n)]),
    (an_array(prefixItems=[STRING], contains={"enum": [1, "x"]}, maxItems=2),
     [[], ["x"], ["y"], ["y", 1], ["y", 2], ["x", None], ["y", "x"], [1], ["x", 1, 1]]),
    (an_array(items={"type": ["integer", "string"]}, contains=STRING, maxItems=3),
     [[], [1], ["a"], [1, "a"], [1, 2, "a"], [1, 2, 3], [1, 2, 3, "a"]]),
    (an_array(contains={}), [[], [1], [1, 2]]),
    (an_array(contains=True, minContains=2, maxContains=3), [[1], [1, 2], [1] * 3, [1] * 4]),
    (an_array(contains={"const": 1}, minContains=0), [[], [2]]),
    (an_array(contains={"const": 1}, maxContains=2, maxItems=2), [[], [2], [1], [1, 1], [1, 1, 1]]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "values"), ENFORCED, ids=lambda v: json.dumps(v)[:60])
def test_what_passes_is_what_is_valid(schema: Any, values: list[Any]) -> None:
    compiled = compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())
    validator = jsonschema.Draft202012Validator(schema)
    for value in values:
        assert passes(compiled, value) == validator.is_valid(value), value


REFUSED: list[tuple[Any, str, str]] = [
    (when(has(a=1), needs("b")), "/if", "if cannot be enforced unless"),
    ({**PETS, **when({"minProperties": 2}, needs("age"))}, "/if", "if cannot be enforced unless"),
    ({**PETS, **when({"not": has(kind="cow")}, needs("age"))}, "/if", "unless all it asks for"),
    ({**PETS, **when({"properties": {"age": {"minimum": 3}}}, False)}, "/if", "unless all it asks"),
    ({**PETS, **when({"properties": {"age": {"const": 3}}}, False)}, "/if", "unless all it asks"),
    ({**PETS, **when({"properties": {"nothing": {"const": 3}}}, False)}, "/if", "unless all it"),
    ({**PETS, **when({"properties": {"kind": {"const": 1.5}}}, False)}, "/if", "unless all it"),
    ({**PETS, **when({"properties": []}, False)}, "/if", "unless all it asks"),
    ({**PETS, **when({"required": "kind"}, False)}, "/if", "unless all it asks"),
    ({**PETS, **when({"type": "array"}, False)}, "/if", "unless all it asks"),
    ({**PETS, **when(7, False)}, "/if", "unless all it asks"),
    ({**PETS, **when(needs(*map(str, range(17))), False)}, "/if", "more than 16 conditions"),
    ({**PETS, **when(has(kind="cow"), {"minLength": "a"})}, "/then/minLength", "must be a number"),
    ({**PETS, **when(has(kind="cow"), None, 7)}, "/else", "must be an object or a boolean"),
    ({**NAMED, **when(has(country="a" * 91), False)}, "/if", "91 characters, the limit is 90"),
    (an_array(contains={"const": 1}), "/contains", "a small maxItems"),
    (an_array(contains={"const": 1}, maxItems=65), "/contains", "a small maxItems"),
    (an_array(contains={"const": 1}, maxItems=12, minContains=3), "/contains", "a small maxItems"),
    ({"contains": {"const": 1}, "maxItems": 3}, "/contains", "a small maxItems"),
    (an_array(contains={"const": 1}, maxItems=3, maxContains=2), "/maxContains", "cannot be enf"),
    (an_array(contains={"const": 1}, maxItems=3, minContains=4), "/contains", "as many items"),
    (an_array(contains={"const": 1}, maxItems=0), "/contains", "as many items"),
    (an_array(contains=False, maxItems=3), "/contains", "as many items"),
    (an_array(contains={"const": 1}, minContains="1"), "/minContains", "must be a number"),
    (an_array(contains=[]), "/contains", "must be an object or a boolean"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "pointer", "words"), REFUSED, ids=lambda v: json.dumps(v)[:60])
def test_what_cannot_be_said_is_refused(schema: Any, pointer: str, words: str) -> None:
    for inner in (schema, {"type": "object", "properties": {"x": schema}}):
        with pytest.raises(InvalidRequestError) as caught:
            compile_grammar(JsonSchema(param="s", schema=inner), vocabulary())
        assert f"{pointer}: " in caught.value.message and words in caught.value.message


OF_DRAFT_7: list[tuple[Any, list[Any]]] = [
    # There minContains is no word, and one item at least must be so.
    (an_array(contains={"const": 1}, minContains=0, maxItems=2), [[], [2], [1], [2, 1]]),
    (
        {
            **PETS,
            "required": [],
            "dependencies": {"age": needs("milk"), "milk": ["kind"], "kind": {}},
        },
        PET_VALUES,
    ),
    ({**PETS, "dependencies": {"age": {"properties": {"milk": False}}}}, PET_VALUES),
]


@pytest.mark.parametrize(("schema", "values"), OF_DRAFT_7, ids=lambda v: json.dumps(v)[:60])
def test_words_of_an_older_draft(schema: Any, values: list[Any]) -> None:
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
    compiled = compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())
    validator = jsonschema.Draft7Validator(schema)
    for value in values:
        assert passes(compiled, value) == validator.is_valid(value), value


PARTS: list[Any] = [
    needs("a"), needs("b"), {"properties": {"a": False}}, {"properties": {"b": {"const": 1}}},
    {"properties": {"c": {"type": "string"}}}, {"properties": {"c": {"enum": [1, "x"]}}}, False,
    {**needs("c"), **has(b=None)}, has(a=2, c="y"),
]  # fmt: skip
CONDITIONS: list[Any] = [
    has(a=1), has(a=1, b=None), {**has(b=1), **needs("b")}, needs("a"), needs("a", "c"), has(c="x"),
    {"properties": {"a": {"enum": [1, 2]}}}, {**has(c="x"), **needs("a")}, True,
]  # fmt: skip
CHOICES: dict[str, list[Any]] = {"a": [1, 2, 3], "b": [1, None], "c": ["x", "y", "xx"]}
OBJECTS: list[Any] = [
    {name: value for name, value in zip("abc", values, strict=True) if value != "-"}
    for values in itertools.product(*[[*some, "-"] for some in CHOICES.values()])
]


def a_condition(rng: random.Random, depth: int) -> dict[str, Any]:
    condition = when(rng.choice(CONDITIONS), rng.choice([None, *PARTS]), rng.choice([None, *PARTS]))
    if depth and rng.random() < 0.5:
        condition[rng.choice(["then", "else"])] = a_condition(rng, depth - 1)
    return condition


@pytest.mark.parametrize("seed", range(4))
def test_random_conditions(seed: int) -> None:
    """Beside each other, within each other and within allOf."""
    rng = random.Random(seed)
    num_passed = num_compiled = 0
    for _ in range(15):
        schema: dict[str, Any] = an_object(
            properties={"a": {"enum": CHOICES["a"]}, "b": {"enum": CHOICES["b"]}, "c": STRING},
            additionalProperties=rng.random() < 0.5, **a_condition(rng, 1),
        )  # fmt: skip
        if rng.random() < 0.5:
            schema["allOf"] = [a_condition(rng, 1) for _ in range(rng.randint(1, 2))]
        try:
            compiled = compile_grammar(JsonSchema(param="s", schema=schema), vocabulary())
        except InvalidRequestError as error:
            assert "cannot be enforced: Unsatisfiable" in error.message or (
                "no finite value" in error.message
            ), error.message
            continue
        num_compiled += 1
        validator = jsonschema.Draft202012Validator(schema)
        for value in rng.sample(OBJECTS, 12):
            is_valid = validator.is_valid(value)
            num_passed += is_valid
            assert passes(compiled, value) == is_valid, (schema, value)
    assert num_compiled > 8 and num_passed > num_compiled
