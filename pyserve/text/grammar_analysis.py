"""What a rewritten schema costs to compile, and whether any finite value is valid by it.

The schemas are those that engine_schema has made: every reference is a `$ref` to a definition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from math import prod
from typing import Any

MAX_MEETING = 12  # patterns that one string must match; compile time doubles with each
MAX_COMBINED = 200_000  # schemas, each counted once for every combination of branches it is part of

Schema = dict[str, Any]


def check_cost(
    root: Schema, definitions: Mapping[str, Schema | bool], refuse: Callable[[str, str], None]
) -> None:
    """Refuse, by calling `refuse` with a pointer and a reason, what the engine would compile for
    minutes.

    Patterns: more than MAX_MEETING of them on one string, or several multipleOf on one number. This
    is an upper bound: where schemas are joined, the worst value of one is taken to meet the worst
    of the others.

    Combinations: where several parts must hold together, the engine joins each branch of one with
    each branch of the others, and walks through everything within for every combination.
    """
    meeting: dict[str, tuple[int, int]] = {}  # name of a definition -> its counts
    combinations: dict[str, tuple[int, int]] = {}
    worst = partial(_worst, known=meeting, refuse=refuse)
    combined = partial(_combined, known=combinations, refuse=refuse)
    for name in _inner_first(definitions):
        meeting[name] = worst(definitions[name])
        combinations[name] = combined(definitions[name])
    worst(root)
    combined(root)


def can_end(root: Schema, definitions: Mapping[str, Schema | bool]) -> bool:
    """Whether some value of `root` is finite, judged by what it requires. Starting from none,
    definitions are added whose required parts are all finite, until nothing changes (least fixed
    point).
    """
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
    """The largest number of patterns, and of multipleOf, that a single value within `schema` must
    match.

    known  the same numbers for the definitions that have been counted.
    """
    if not isinstance(schema, dict):
        return 0, 0
    worst = partial(_worst, known=known, refuse=refuse)
    own = ("pattern" in schema) + ("format" in schema), int("multipleOf" in schema)
    parts = [_most([own, *map(worst, _within(schema))])]
    parts += map(worst, schema.get("allOf", ()))
    parts += (_most(list(map(worst, schema[k]))) for k in ("anyOf", "oneOf") if k in schema)
    if "$ref" in schema:
        # Unknown where definitions refer to each other in a cycle.
        parts.append(known.get(_name(schema), (0, 0)))
    patterns, multiples = (sum(part[i] for part in parts) for i in (0, 1))
    if patterns > MAX_MEETING:
        refuse("", f"{patterns} patterns may meet on one string, the limit is {MAX_MEETING}")
    if multiples > 1:
        refuse("", "several multipleOf may meet on one number, which cannot be enforced")
    return patterns, multiples


def _combined(
    schema: Schema | bool,
    *,
    known: Mapping[str, tuple[int, int]],
    refuse: Callable[[str, str], None],
) -> tuple[int, int]:
    """The number of branches of `schema` once they are combined, and of schemas in all of them.

    known  the same numbers for the definitions that have been counted.
    """
    if not isinstance(schema, dict):
        return 1, 1
    combined = partial(_combined, known=known, refuse=refuse)
    parts = [(1, 1 + sum(combined(inner)[1] for inner in _within(schema)))]
    parts += map(combined, schema.get("allOf", ()))
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            branches = list(map(combined, schema[keyword]))
            parts.append((sum(b[0] for b in branches), sum(b[1] for b in branches)))
    if "$ref" in schema:
        num_branches, num_schemas = known.get(_name(schema), (1, 1))
        # A plain reference is shared, not walked again.
        parts.append((num_branches, num_schemas if len(schema) > 1 else 1))
    num_branches = prod(part[0] for part in parts)
    num_schemas = sum(num * (num_branches // max(own, 1)) for own, num in parts)
    if num_schemas > MAX_COMBINED:
        refuse("", f"its anyOf, oneOf and allOf have more than {MAX_COMBINED} combinations, as "
                   "what is within one of them or beside it counts in each")  # fmt: skip
    return num_branches, num_schemas


def _ends(schema: Schema | bool, *, ending: AbstractSet[str]) -> bool:
    """Whether some value of `schema` is finite, given that those of the definitions in `ending`
    are.
    """
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
    """Names of definitions, each after those that it refers to, except where they form a cycle."""
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
    """The name of the definition that the $ref of a schema leads to."""
    name: str = schema["$ref"].rpartition("/")[2]
    return name


def _most(counts: list[tuple[int, int]]) -> tuple[int, int]:
    return max(count[0] for count in counts), max(count[1] for count in counts)


def _within(schema: Schema) -> list[Schema | bool]:
    """The schemas of the values inside a value of `schema`: its properties and items."""
    inner: list[Schema | bool] = list(schema.get("prefixItems", ()))
    for keyword in ("properties", "patternProperties"):
        inner += schema.get(keyword, {}).values()
    inner += [schema[keyword] for keyword in ("items", "additionalProperties") if keyword in schema]
    return inner
