"""200 schemas of our own in the shapes of the JSON-Schema-Test-Suite: whatever random weights say,
an answer that ends is valid."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from pyserve.text.grammar import JsonSchema, compile_grammar
from tests.text.grammars import answer, vocabulary

NUM_SCHEMAS = 200
NUM_ANSWERS = 3

STRINGS: list[dict[str, Any]] = [
    {"type": "string"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "maxLength": 3},
    {"type": "string", "pattern": "^[a-z]{2,4}$"},
    {"type": "string", "pattern": "a.c"},
    {"type": "string", "pattern": "^(?:x|yy)+[0-9]*$"},
    {"type": "string", "pattern": r"^\d{3}-\w+$", "maxLength": 12},
    {"type": "string", "pattern": r"^[^[\]{}&~]+$", "maxLength": 6},
    {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "z$"}], "maxLength": 9},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"enum": ["red", "green", 'qu"ote', "é😀", ""]},
    {"const": "only"},
]
NUMBERS: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "integer", "minimum": -5, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1001},
    {"type": "integer", "minimum": 7},
    {"type": "integer", "maximum": -3},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "number"},
    {"type": "number", "minimum": -0.5, "maximum": 1.25},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "minimum": 1e6},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 4},
    {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    {"enum": [1, 2.5, -3]},
    {"const": 42},
    {"minimum": 3, "exclusiveMinimum": True, "type": "integer", "maximum": 5},
]
OTHERS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": ["integer", "boolean"]},
    {"enum": [None, True, 7, "x", [1, 2], {"a": 1}]},
    {"const": {"a": [1, {"b": None}]}},
    {"const": []},
]


class Maker:
    """Schemas from a seed. `definitions` may be referred to from anywhere."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Any] = {
            "short": {"type": "string", "maxLength": 4},
            "small/odd~name": {"type": "integer", "minimum": 0, "maximum": 9},
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"$ref": "#/$defs/small~1odd~0name"},
                    "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            },
        }

    def schema(self) -> dict[str, Any]:
        return {**self.inner(3), "$defs": self.definitions}

    def inner(self, depth: int) -> dict[str, Any]:
        makers = [self.leaf, self.reference]
        if depth:
            makers += [self.object, self.object, self.array, self.tuple, self.any_of, self.all_of,
                       self.one_of, self.map]  # fmt: skip
        return self.rng.choice(makers)(depth - 1)

    def leaf(self, depth: int) -> dict[str, Any]:
        return dict(self.rng.choice(self.rng.choice([STRINGS, NUMBERS, OTHERS])))

    def reference(self, depth: int) -> dict[str, Any]:
        name = self.rng.choice(["short", "small~1odd~0name", "tree", "small~1odd%7E0name"])
        return {"title": "a reference", "$ref": f"#/$defs/{name}"}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(["a", "b b", "c/d", "é", "x1", 'q"'], self.rng.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: self.inner(depth) for name in names},
            "required": [name for name in names if self.rng.random() < 0.6],
            **self.rng.choice([{}, {"additionalProperties": False},
                               {"additionalProperties": {"type": "boolean"}}]),
        }  # fmt: skip

    def map(self, depth: int) -> dict[str, Any]:
        return self.rng.choice([
            {"type": "object", "additionalProperties": self.inner(depth), "maxProperties": 3},
            {"type": "object", "patternProperties": {"^x[0-9]$": self.inner(depth)},
             "additionalProperties": False, "minProperties": 1},
        ])  # fmt: skip

    def array(self, depth: int) -> dict[str, Any]:
        low = self.rng.randint(0, 2)
        return {
            "type": "array",
            "items": self.inner(depth),
            "minItems": low,
            "maxItems": low + self.rng.randint(0, 2),
        }

    def tuple(self, depth: int) -> dict[str, Any]:
        first = [self.inner(depth) for _ in range(self.rng.randint(1, 3))]
        rest = self.rng.choice([False, {"type": "integer"}])
        return {
            "type": "array", "prefixItems": first, "items": rest, "minItems": len(first),
            "maxItems": len(first) + (rest is not False),
        }  # fmt: skip

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.inner(depth) for _ in range(self.rng.randint(1, 3))]}

    def all_of(self, depth: int) -> dict[str, Any]:
        return self.rng.choice([
            {"type": "object", "properties": {"k": self.inner(depth)}, "required": ["k"],
             "allOf": [{"properties": {"l": {"type": "boolean"}}, "required": ["l"]}]},
            {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
            {"type": "string", "allOf": [{"minLength": 1}, {"maxLength": 4}]},
            {"$ref": "#/$defs/short", "minLength": 2},
        ])  # fmt: skip

    def one_of(self, depth: int) -> dict[str, Any]:
        """With a property that tells the branches apart, as pydantic writes it."""
        for kind in ("cat", "dog"):
            self.definitions[kind] = {
                "type": "object",
                "properties": {"kind": {"const": kind}, "age": self.inner(0)},
                "required": ["kind"],
            }
        return {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}, {"type": "null"}],
            "discriminator": {"propertyName": "kind"},
        }


@pytest.mark.parametrize("first", range(0, NUM_SCHEMAS, 20))
def test_what_ends_is_valid(first: int) -> None:
    vocab = vocabulary()
    num_ended = 0
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        schema = Maker(rng).schema()
        checked = json.loads(json.dumps(schema))
        for bound in _bounds_of_draft_4(checked):
            bound["exclusiveMinimum"] = bound.pop("minimum")
        compiled = compile_grammar(JsonSchema(param="schema", schema=schema), vocab)
        for _ in range(NUM_ANSWERS):
            token_ids, has_ended = answer(compiled.constraint(), vocab, rng, 400)
            if not has_ended:
                continue
            num_ended += 1
            text = vocab.tokenizer.decode(token_ids, skip_special_tokens=False)
            value = json.loads(text)
            jsonschema.Draft202012Validator(
                checked, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            ).validate(value)
    assert num_ended > NUM_ANSWERS * 20 * 0.6


def _bounds_of_draft_4(schema: Any) -> list[dict[str, Any]]:
    found = [schema] if isinstance(schema, dict) and schema.get("exclusiveMinimum") is True else []
    inner = schema.values() if isinstance(schema, dict) else schema
    for item in inner if isinstance(inner, list) or isinstance(schema, dict) else ():
        if isinstance(item, dict | list):
            found += _bounds_of_draft_4(item)
    return found
