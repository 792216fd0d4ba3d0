"""Objects and arrays that a grammar lets pass are valid: tried text by text, not by what a model
might write, which rarely comes near what is wrong."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import JsonSchema, compile_grammar
from tests.text.grammars import allowed, vocabulary

NUM_SCHEMAS, NUM_TEXTS = 40, 40
VALUES = [1, 2, None, "s", 3]
NAMES = ["a", "b", "ab", "ba", "x", "ax", "xb", "y"]
INNER: list[Any] = [
    {"type": "integer"}, {"type": "null"}, {"const": 1}, {"type": ["integer", "null"]}, True, False,
    {"minimum": 2}, {"type": "string"}, {"enum": [1, None, "s"]},
]  # fmt: skip


def shuffled(schema: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The engine reads keywords in their order."""
    items = list(schema.items())
    rng.shuffle(items)
    return dict(items)


def an_object(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    parts = {
        "properties": {name: rng.choice(INNER) for name in rng.sample(NAMES[:4], 2)},
        "patternProperties": {rng.choice(["^a", "^b", "b$", "^x"]): rng.choice(INNER)},
        "additionalProperties": rng.choice(INNER),
        "required": rng.sample(["a", "b", "ab", "x"], rng.randint(1, 2)),
        "minProperties": rng.randint(0, 2),
        "maxProperties": rng.randint(1, 3),
    }
    chances = (0.7, 0.4, 0.5, 0.5, 0.2, 0.2)
    kept = {n: p for (n, p), chance in zip(parts.items(), chances, strict=True)
            if rng.random() < chance}  # fmt: skip
    return combined({"type": "object", **kept}, an_object, rng, depth)


def an_array(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    parts = {
        "prefixItems": [rng.choice(INNER) for _ in range(rng.randint(1, 3))],
        "items": rng.choice(INNER),
        "minItems": rng.randint(0, 3),
        "maxItems": rng.randint(1, 4),
    }
    kept = {name: part for name, part in parts.items() if rng.random() < 0.6}
    return combined({"type": "array", **kept}, an_array, rng, depth)


def combined(schema: dict[str, Any], make: Any, rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0 and rng.random() < 0.5:
        keyword = rng.choice(["allOf", "anyOf", "oneOf"])
        schema[keyword] = [make(rng, 1) for _ in range(rng.randint(1, 2))]
    return shuffled(schema, rng)


def a_value(schema: dict[str, Any], rng: random.Random) -> Any:
    if schema["type"] == "array":
        return [rng.choice(VALUES) for _ in range(rng.randint(0, 5))]
    order = list(schema.get("properties", {}))
    names = rng.sample(NAMES, rng.randint(0, 4))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    return {name: rng.choice(VALUES) for name in names}


@pytest.mark.parametrize("make", [an_object, an_array])
def test_what_passes_is_valid(make: Any) -> None:
    vocab = vocabulary()
    num_compiled = num_passed = 0
    for seed in range(NUM_SCHEMAS):
        rng = random.Random(seed)
        schema = make(rng)
        try:
            compiled = compile_grammar(JsonSchema(param="s", schema=schema, whitespace=""), vocab)
        except InvalidRequestError:
            continue
        num_compiled += 1
        validator = jsonschema.Draft202012Validator(schema)
        for _ in range(NUM_TEXTS):
            value = a_value(schema, rng)
            text = json.dumps(value, separators=(",", ":"))
            constraint = compiled.constraint()
            constraint.accept(vocab.tokenizer.encode_inner(text))
            if constraint.error is None and (
                constraint.is_finished or vocab.eos_token_ids[0] in allowed(constraint, vocab)
            ):
                num_passed += 1
                assert validator.is_valid(value), (schema, text)
    assert num_compiled > NUM_SCHEMAS // 4
    assert num_passed > num_compiled
