"""What a schema of engine_schema's costs to compile, and whether anything finite is valid by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    known: dict[str, tuple[int, int]] = {}  # of definitions; of one that holds itself, 0 meanwhile

    def worst(schema: Schema | bool) -> tuple[int, int]:
        """Patterns, and multiples, that a value in a value of `schema` must match."""
        if not isinstance(schema, dict):
            return 0, 0
        own = ("pattern" in schema) + ("format" in schema), int("multipleOf" in schema)
        parts = [_most([own, *map(worst, _within(schema))])]
        parts += map(worst, schema.get("allOf", ()))
        parts += (_most(list(map(worst, schema[k]))) for k in ("anyOf", "oneOf") if k in schema)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in known:
                known[name] = 0, 0
                known[name] = worst(definitions[name])
            parts.append(known[name])
        patterns, multiples = (sum(part[i] for part in parts) for i in (0, 1))
        if patterns > MAX_MEETING:
            refuse("", f"{patterns} patterns may meet on one string, the limit is {MAX_MEETING}")
        if multiples > 1:
            refuse("", "several multipleOf may meet on one number, which cannot be enforced")
        return patterns, multiples

    worst(root)


def _most(counts: list[tuple[int, int]]) -> tuple[int, int]:
    return max(count[0] for count in counts), max(count[1] for count in counts)


def _within(schema: Schema) -> list[Schema | bool]:
    """Schemas of what is in a value of `schema`."""
    inner: list[Schema | bool] = list(schema.get("prefixItems", ()))
    for keyword in ("properties", "patternProperties"):
        inner += schema.get(keyword, {}).values()
    inner += [schema[keyword] for keyword in ("items", "additionalProperties") if keyword in schema]
    return inner


def can_end(root: Schema, definitions: Mapping[str, Schema | bool]) -> bool:
    """Whether some value of `root` is finite, by what must be in it; a smallest fixed point."""
    ending: set[str] = set()

    def ends(schema: Schema | bool) -> bool:
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in ending:
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

    while True:
        new = {name for name in definitions.keys() - ending if ends(definitions[name])}
        if not new:
            return ends(root)
        ending |= new
