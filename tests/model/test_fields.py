"""Typed reading of one JSON object: null, absent and wrongly typed are three different things."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyserve.errors import ConfigError
from pyserve.model.fields import Fields

FIELDS = Fields({"null": None, "text": "12", "yes": True, "whole": 3, "empty": {}}, "config.json")


def test_absent_is_the_default_and_null_is_not() -> None:
    assert FIELDS.integer("absent", 1, 9, default=4) == 4
    assert FIELDS.integer("null", 1, 9, default=4, is_nullable=True) == 4
    assert FIELDS.number("null", 0, 1, default=0.5, is_nullable=True) == 0.5
    assert FIELDS.string("null", default="a", is_nullable=True) == "a"
    # Python takes null for false, and so do models that test it.
    assert FIELDS.boolean("null", default=True) is False
    assert FIELDS.boolean("absent", default=True) is True


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: FIELDS.integer("null", 1, 9, default=4), ["null must be an integer", "got null"]),
        (lambda: FIELDS.number("null", 0, 1, default=0.5), ["null must be a number", "got null"]),
        (lambda: FIELDS.string("null", default="a"), ["null must be a string", "got null"]),
        (lambda: FIELDS.integer("null", 1, 9), ["null is missing"]),
        (lambda: FIELDS.integer("text", 1, 99), ["text must be an integer", 'got "12"']),
        (lambda: FIELDS.integer("yes", 0, 99), ["yes must be an integer", "got true"]),
        (lambda: FIELDS.number("yes", 0, 99), ["yes must be a number", "got true"]),
        (lambda: FIELDS.boolean("whole", default=False), ["whole must be true or false", "got 3"]),
        (lambda: FIELDS.table("whole"), ["whole must be an object", "got 3"]),
    ],
)
def test_refusals_name_key_value_and_rule(read: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: ") as refusal:
        read()
    for word in words:
        assert word in str(refusal.value)


def test_what_is_empty() -> None:
    assert FIELDS.is_empty("absent") and FIELDS.is_empty("null") and FIELDS.is_empty("empty")
    assert not FIELDS.is_empty("text") and not FIELDS.is_empty("yes")
    assert not Fields({"list": []}, "x").is_empty("list")
