"""Bounds of numbers, exhaustively on a grid: what a grammar lets pass is within them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import JsonSchema, compile_grammar
from tests.text.grammars import allowed, vocabulary

BOUNDS = [None, -1.5, -1, 0, 0.25, 1, 1.5, 10]
TEXTS = (
    "0 -0 0.0 -0.0 1 1.0 -1 -1.0 0.25 0.26 -0.25 1.5 -1.5 1.50 1.01 -1.01 2 9 10 10.0 11 -2 "
    "0.000001 -0.000001"
).split()


def ranges() -> list[dict[str, Any]]:
    found = []
    for low, high, *exclusive in itertools.product(BOUNDS, BOUNDS, (False, True), (False, True)):
        schema: dict[str, Any] = {}
        if low is not None:
            schema["exclusiveMinimum" if exclusive[0] else "minimum"] = low
        if high is not None:
            schema["exclusiveMaximum" if exclusive[1] else "maximum"] = high
        if schema not in found and (low is None or high is None or low <= high):
            found.append(schema)
    return found


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_what_passes_is_within_the_bounds(kind: Any) -> None:
    vocab = vocabulary()
    num_passed = num_valid = 0
    for bounds in ranges():
        schema = {"type": kind, **bounds}
        valid = {
            text: jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
            for text in TEXTS
        }
        try:
            compiled = compile_grammar(JsonSchema(param="s", schema=schema), vocab)
        except InvalidRequestError:
            assert kind == "integer" or not any(valid.values()), schema
            assert not any(value and "." not in text for text, value in valid.items()), schema
            continue
        for text in TEXTS:
            constraint = compiled.constraint()
            constraint.accept(vocab.tokenizer.encode_inner(text))
            passes = constraint.error is None and (
                constraint.is_finished or vocab.eos_token_ids[0] in allowed(constraint, vocab)
            )
            assert valid[text] or not passes, (schema, text)
            num_passed += passes
            num_valid += valid[text]
    assert num_passed > 0.4 * num_valid  # integers are not written 1.0, nor 0.25 as 0.250


@pytest.mark.parametrize("value", [0.1, 1e-7, 123456.789, -0.0, 2**53, -(2**53), 1 / 3, -1.5e-5])
def test_a_number_of_an_enum_is_itself(value: float) -> None:
    compiled = compile_grammar(JsonSchema(param="s", schema={"enum": [value]}), vocabulary())
    constraint = compiled.constraint()
    text = ""
    while not constraint.is_finished:
        choices = allowed(constraint, vocabulary())
        if vocabulary().eos_token_ids[0] in choices:
            break
        constraint.accept([int(choices[0])])
        text += vocabulary().tokenizer.decode([int(choices[0])], skip_special_tokens=False)
    assert json.loads(text) == value
