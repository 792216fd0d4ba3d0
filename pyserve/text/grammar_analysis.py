"""What a schema of engine_schema's costs to compile, and whether anything finite is valid by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

MAX_MEETING = 12  # patterns that one string must match: its compile doubles with each

Schema = dict[str, Any]


def check_meeting(
    root: Schema, definitions: Mapping[str, Schema | bool], refuse: Callable[[str, str], None]
) -> None:
    """Refuse strings that more than MAX_MEETING patterns may meet on, numbers likewise.

    Counted from above: where schemas are joined, what is worst in one of them may meet what is
    worst in the others.
    """
    known: dict[str, tuple[int, int]] = {}  # of definitions
    worst = partial(_worst, known=known, refuse=refuse)
    for name in _inner_first(definitions):
        known[name] = worst(definitions[name])
    worst(root)


def can_end(root: Schema, definitions: Mapping[str, Schema | bool]) -> bool:
    """Whether some value of `root` is finite, by what must be in it; a smallest fixed point."""
    ending: set[str] = set()
    ends = partial(_ends, ending=ending)
    order = _inner_first(definitions)
    num_before = -1
    while len(ending) > num_before:
        num_before = len(ending)
        ending.update(name for name in order if name not in ending and ends(definitions[name]))
    return ends(root)


def _worst(
    schema: Schema | bool,
    *,
    known: Mapping[str, tuple[int, int]],
    refuse: Callable[[str, str], None],
) -> tuple[int, int]:
    """Patterns, and multiples, that a value in a value of `schema` must match."""
    if not isinstance(schema, dict):
        return 0, 0
    worst = partial(_worst, known=known, refuse=refuse)
    own = ("pattern" in schema) + ("format" in schema), int("multipleOf" in schema)
    parts = [_most([own, *map(worst, _within(schema))])]
    parts += map(worst, schema.get("allOf", ()))
    parts += (_most(list(map(worst, schema[k]))) for k in ("anyOf", "oneOf") if k in schema)
    if "$ref" in schema:
        parts.append(known.get(_name(schema), (0, 0)))  # unknown: it holds itself
    patterns, multiples = (sum(part[i] for part in parts) for i in (0, 1))
    if patterns > MAX_MEETING:
        refuse("", f"{patterns} patterns may meet on one string, the limit is {MAX_MEETING}")
    if multiples > 1:
        refuse("", "several multipleOf may meet on one number, which cannot be enforced")
    return patterns, multiples


def _ends(schema: Schema | bool, *, ending: AbstractSet[str]) -> bool:
    """Whether a value of `schema` is finite where those of the definitions `ending` are."""
    if not isinstance(schema, dict):
        return schema
    ends = partial(_ends, ending=ending)
    if "$ref" in schema and _name(schema) not in ending:
        return False
    if not all(map(ends, schema.get("allOf", ()))):
        return False
    if not all(any(map(ends, schema[k])) for k in ("anyOf", "oneOf") if k in schema):
        return False
    types = schema.get("type")
    if types == "object":
        properties = schema.get("properties", {})
        return all(ends(properties.get(name, True)) for name in schema.get("required", ()))
    if types == "array":
        needed = schema.get("minItems", 0)
        first = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        return all(map(ends, first[:needed])) and (needed <= len(first) or ends(rest))
    return True


def _inner_first(definitions: Mapping[str, Schema | bool]) -> list[str]:
    """Names, each behind those it refers to, but where they refer to one another in a circle."""
    order: list[str] = []
    seen: set[str] = set()
    for first in definitions:
        stack = [(first, iter((first,)))]
        while stack:
            name, inner = stack[-1]
            following = next((other for other in inner if other not in seen), None)
            if following is not None:
                seen.add(following)
                stack.append((following, iter(_references(definitions[following]))))
            else:
                stack.pop()
                if stack:
                    order.append(name)
    return order


def _references(schema: Schema | bool) -> list[str]:
    """Names of the definitions that a schema refers to."""
    found = []
    stack = [schema]
    while stack:
        schema = stack.pop()
        if isinstance(schema, dict):
            if "$ref" in schema:
                found.append(_name(schema))
            stack += _within(schema)
            for keyword in ("allOf", "anyOf", "oneOf"):
                stack += schema.get(keyword, ())
    return found


def _name(schema: Schema) -> str:
    """Of the definition that a schema with $ref leads to."""
    name: str = schema["$ref"].rpartition("/")[2]
    return name


def _most(counts: list[tuple[int, int]]) -> tuple[int, int]:
    return max(count[0] for count in counts), max(count[1] for count in counts)


def _within(schema: Schema) -> list[Schema | bool]:
    """Schemas of what is in a value of `schema`."""
    inner: list[Schema | bool] = list(schema.get("prefixItems", ()))
    for keyword in ("properties", "patternProperties"):
        inner += schema.get(keyword, {}).values()
    inner += [schema[keyword] for keyword in ("items", "additionalProperties") if keyword in schema]
    return inner
