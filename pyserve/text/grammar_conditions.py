"""JSON Schema conditions, rewritten exactly in keywords that the grammar engine reads, or refused.

if        supported for objects, if it only asks that properties have one of a few values or are
          present. Either `if` and `then` hold, or the opposite of `if` and `else`: one of these
          properties has another value, or is missing.
contains  supported for arrays of limited length: one branch for each set of places where the
          matching items may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb
from typing import Any

from pyserve.text.grammar_pattern import PatternError, all_but
from pyserve.text.grammar_rewrites import (
    MAX_CHOICES,
    NOTES,
    RewriteError,
    are_names,
    values_of,
    without,
)

Schema = dict[str, Any]
Follow = Callable[[object], object]

MAX_PLACES = 64  # sets of places where the items of `contains` may be
_IF = (
    "if cannot be enforced unless all it asks for is that properties have one of a few values "
    "(const, enum) or are required, in a schema with the type object that says which values (enum, "
    "or strings) each of them may have: leave it out"
)
_CONTAINS = (
    "cannot be enforced but in a schema with the type array and a small maxItems: leave it out"
)


def opposites(condition: object, around: Sequence[Schema], follow: Follow) -> list[Schema]:
    """Schemas, as a client would write them, of which at least one holds exactly where `condition`
    does not, for values that are valid by `around`.

    around  schemas that all apply to the same value.
    follow  returns the schema that a plain reference leads to; any other schema as it is.

    Raises RewriteError.
    """
    condition = follow(condition)
    if isinstance(condition, bool):
        return [] if condition else [{}]
    if not isinstance(condition, dict) or condition.keys() - NOTES - {
        "type", "properties", "required"
    }:  # fmt: skip
        raise RewriteError("if", _IF)
    properties, names = condition.get("properties", {}), condition.get("required", [])
    is_of_objects = any(schema.get("type") == "object" for schema in around)
    is_plain = condition.get("type", "object") == "object" and isinstance(properties, dict)
    if not (is_of_objects and is_plain and are_names(names)):
        raise RewriteError("if", _IF)
    found = [without(name) for name in names]
    for name, asked in properties.items():
        other = _other_values(follow(asked), _declared(name, around, follow))
        if other is not False:
            found.append({"properties": {name: other}, "required": [name]})
    if len(found) > MAX_CHOICES:
        raise RewriteError("if", f"if has more than {MAX_CHOICES} conditions: leave some out")
    return found


def both(one: Schema | bool, other: Schema | bool) -> Schema | bool:
    """A schema that holds where both hold."""
    if one is False or other is False:
        return False
    parts = [part for part in (one, other) if part is not True and part != {}]
    return {"allOf": parts} if len(parts) > 1 else parts[0] if parts else True


def containing(
    inner: Schema | bool, schema: Schema, *, least: int, most: int | None
) -> list[Schema]:
    """Schemas, as the engine reads them, that hold where at least `least` and at most `most` items
    of an array are valid by `inner`. `schema` is the array's schema. Raises RewriteError.
    """
    if inner is True or inner == {}:
        bounds = {"minItems": least} if most is None else {"minItems": least, "maxItems": most}
        return [bounds]
    length = schema.get("maxItems")
    if type(length) is not int or not 0 <= length <= MAX_PLACES or schema.get("type") != "array":
        length = None
    if most is not None and (length is None or most < length):
        raise RewriteError("maxContains", f"maxContains {_CONTAINS}")
    if least == 0:
        return []
    if length is None or comb(length, least) > MAX_PLACES:
        raise RewriteError("contains", f"contains {_CONTAINS}")
    if inner is False or least > length:
        raise RewriteError("contains", "no array has as many items as contains asks for")
    return [{"anyOf": [_with_items_at(inner, at) for at in combinations(range(length), least)]}]


def _with_items_at(inner: Schema | bool, places: Sequence[int]) -> Schema:
    first = [inner if index in places else True for index in range(places[-1] + 1)]
    return {"prefixItems": first, "minItems": len(first)}


def _declared(name: str, around: Sequence[Schema], follow: Follow) -> list[object]:
    """What each of the schemas says about a property, for those that say anything."""
    return [
        follow(schema["properties"][name])
        for schema in around
        if isinstance(schema.get("properties"), dict) and name in schema["properties"]
    ]


def _other_values(asked: object, declared: Sequence[object]) -> Schema | bool:
    """A schema of the values, among those that `declared` allows, that are not valid by `asked`;
    False if there are none. Raises RewriteError.
    """
    if asked is True or isinstance(asked, dict) and not asked.keys() - NOTES:
        return False
    values = values_of(asked)
    if values is None:
        raise RewriteError("if", _IF)
    known = {(type(value), value) for value in values}
    for possible in map(values_of, declared):
        if possible is not None:
            others = [value for value in possible if (type(value), value) not in known]
            return {"enum": others} if others else False
    if not any(isinstance(one, dict) and one.get("type") == "string" for one in declared):
        raise RewriteError("if", _IF)
    try:
        pattern = all_but({value for value in values if isinstance(value, str)})
    except PatternError as error:
        raise RewriteError("if", str(error)) from None
    return {"type": "string", "pattern": pattern}
