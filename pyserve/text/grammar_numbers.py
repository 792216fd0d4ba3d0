"""JSON Schema keywords whose value is a number, checked and rewritten for the grammar engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pyserve.params import INT64_MAX, INT64_MIN
from pyserve.text.grammar_errors import shown

MAX_LENGTH = 100_000  # minLength, maxLength
MAX_ITEMS = 10_000  # minItems, maxItems, minProperties, maxProperties
MAX_MULTIPLE = 10_000  # a multiple's digits as a number: the engine's automaton has so many states
MAX_EXACT = 2**53  # the engine computes with floats, which hold integers exactly up to here
MIN_BOUND = 1e-9  # smallest absolute value of a bound other than 0
MAX_INTEGER = 9 * 10**18  # replaces the extremes of int64 as a bound: the engine overflows at those

CONTAINS_COUNTS = frozenset(("minContains", "maxContains"))

Schema = dict[str, Any]


class NumberError(ValueError):
    """What is wrong with the value of a keyword."""


def _length(schema: Schema, keyword: str) -> Schema:
    return _whole(schema, keyword, MAX_LENGTH)


def _count(schema: Schema, keyword: str) -> Schema:
    return _whole(schema, keyword, MAX_ITEMS)


def _multiple(schema: Schema, keyword: str) -> Schema:
    value = _number(schema[keyword])
    digits = f"{value:.12f}".rstrip("0").partition(".")[2] if value != int(value) else ""
    scaled = round(value * 10 ** len(digits))
    if not 0 < scaled <= MAX_MULTIPLE or scaled / 10 ** len(digits) != value:
        raise NumberError(
            f"must be above 0 and have no more than {MAX_MULTIPLE} as its digits, got "
            f"{shown(value)}"
        )
    return {keyword: value}


def _bound(schema: Schema, keyword: str) -> Schema:
    """minimum, maximum and their exclusive forms. In draft 4 exclusiveMinimum is a boolean that
    makes the `minimum` beside it exclusive.
    """
    value = schema[keyword]
    is_exclusive = keyword.startswith("exclusive")
    plain = keyword.removeprefix("exclusive").lower() if is_exclusive else keyword
    strict = "exclusive" + plain.capitalize()
    if is_exclusive and isinstance(value, bool):
        return {}
    value = _number(value)
    if not is_exclusive and schema.get(strict) is True:
        keyword = strict
    if abs(value) > MAX_EXACT:
        extreme = INT64_MIN if plain == "minimum" else INT64_MAX
        if value != extreme or schema.get("type") != "integer" or keyword != plain:
            raise NumberError(f"must be within 2**53, got {shown(value)}")
        return {keyword: MAX_INTEGER if value > 0 else -MAX_INTEGER}
    if value and abs(value) < MIN_BOUND:
        raise NumberError(f"must be 0 or at least {MIN_BOUND} from it, got {shown(value)}")
    if keyword == strict and schema.get("type") != "integer":
        # The engine accepts some values at an exclusive bound, such as 0 above 0 and below 1, or 1
        # above 1 and below 1.5. So the bound is moved and becomes an inclusive one.
        step = max(MIN_BOUND, abs(value) * 1e-14)  # tens of times the spacing of floats
        return {"allOf": [{plain: value + step if plain == "minimum" else value - step}]}
    return {keyword: value}


def _whole(schema: Schema, keyword: str, limit: int) -> Schema:
    value = _number(schema[keyword])
    if value != int(value) or not 0 <= value <= limit:
        raise NumberError(f"must be a whole number in [0, {limit}], got {shown(value)}")
    return {keyword: int(value)}


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NumberError(f"must be a number, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise NumberError(f"must be a finite number, got {shown(value)}")
    return value


# keyword -> function that returns what replaces it in a schema, and raises NumberError.
NUMERIC: dict[str, Callable[[Schema, str], Schema]] = {
    "multipleOf": _multiple,
    **dict.fromkeys(("minLength", "maxLength"), _length),
    **dict.fromkeys(("minItems", "maxItems", "minProperties", "maxProperties"), _count),
    **dict.fromkeys(CONTAINS_COUNTS, _count),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _bound),
}
