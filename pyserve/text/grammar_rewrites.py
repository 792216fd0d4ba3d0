"""JSON Schema keywords that the grammar engine lacks, rewritten exactly in those it has, or
refused.

uniqueItems    of an array whose items have a few values: an enum of all possible lists.
propertyNames  an enum, pattern, format or length limits become the only patternProperties; a
               schema that allows any string is dropped.
not            the negation of everything allows nothing; the negation of an object with some
               required properties means that one of them is missing.
dependentRequired, dependencies
               with lists of names: either the property is missing, or those names are present.
unevaluatedProperties, unevaluatedItems
               become additionalProperties and items, where no other schema can have evaluated the
               properties or items.
oneOf          whose branches each require one name: that name is present, all others are missing.
patternProperties
               with the same schema are joined into one pattern, as they may overlap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import permutations
from math import perm
from typing import Any

from pyserve.text.grammar_formats import format_pattern

Schema = dict[str, Any]

MAX_LISTS = 2000  # lists for uniqueItems: enough for all lists of six values
MAX_CHOICES = 16  # branches of a oneOf, properties of a not
# Properties that need others; each doubles the combinations that the engine tries.
MAX_DEPENDENT = 4
MAX_NAME_LENGTH = 1000  # minLength and maxLength in propertyNames

# Keywords that do not affect what is valid.
NOTES = frozenset(
    "title description default examples example deprecated readOnly writeOnly $comment $schema $id "
    "id $anchor $dynamicAnchor $recursiveAnchor $defs definitions $vocabulary contentMediaType "
    "contentEncoding contentSchema discriminator xml externalDocs nullable additionalItems "
    "x-guidance".split()
)
_SYNTAX = re.compile(r"[\\^$.|?*+()\[\]{}]")  # characters to escape in a pattern
_ONLY_NAMES = (
    "propertyNames cannot be enforced unless it is an enum, a pattern, a format or "
    "lengths, and stands without properties and patternProperties: leave it out"
)
# Keywords whose schemas apply to the same value, and so may have evaluated its properties and
# items.
_IN_PLACE = frozenset(
    "allOf anyOf oneOf not if then else $ref $dynamicRef $recursiveRef dependentSchemas "
    "dependencies contains".split()
)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int,), "boolean": (bool,), "null": (type(None),)
}  # fmt: skip


class RewriteError(ValueError):
    """Why a keyword cannot be enforced. `keyword` is its name."""

    def __init__(self, keyword: str, reason: str) -> None:
        super().__init__(reason)
        self.keyword = keyword


def rewritten(
    schema: Schema,
    result: Schema,
    *,
    follow: Callable[[object], object],
    read_pattern: Callable[[object, str], str],
) -> Schema:
    """`result`, with the keywords that this file handles expressed in those that the engine reads.

    result        what the engine is given for the other keywords of `schema`.
    follow        returns the schema that a plain reference leads to; any other schema as it is.
    read_pattern  turns a pattern of the given keyword into the engine's syntax.

    Raises RewriteError.
    """
    if schema.get("uniqueItems", False) is not False:
        result = _unique_items(schema, result, follow)
    if len(result.get("patternProperties", ())) > 1:
        result = {**result, "patternProperties": _joined(result["patternProperties"])}
    names = follow(schema.get("propertyNames", True))
    if not _allows_all_names(names):
        pattern = _names_pattern(names)
        if pattern is None or {"properties", "patternProperties"} & result.keys():
            raise RewriteError("propertyNames", _ONLY_NAMES)
        pattern = read_pattern(pattern, "propertyNames")
        others = result.get("additionalProperties", True)
        result |= {"patternProperties": {pattern: others}, "additionalProperties": False}
    result = _unevaluated(schema, _one_required(schema, result))
    others = [*_dependent(schema), *_negated(schema)]
    return {**result, "allOf": [*result.get("allOf", ()), *others]} if others else result


def allows_nothing(schema: Schema) -> bool:
    """Whether a schema is the negation of one that allows everything."""
    negated = schema.get("not", False)
    return negated is True or isinstance(negated, dict) and not negated.keys() - NOTES


def _left_out(keyword: str) -> RewriteError:
    return RewriteError(keyword, f"{keyword} cannot be enforced, leave it out")


def _unevaluated(schema: Schema, result: Schema) -> Schema:
    for keyword, named in (("unevaluatedProperties", "additionalProperties"),
                           ("unevaluatedItems", "items")):  # fmt: skip
        value = schema.get(keyword, True)
        if value is True or named in schema and not isinstance(schema[named], list):
            continue
        if value is not False or _IN_PLACE & schema.keys() or named in result:
            raise _left_out(keyword)
        result = {**result, named: False}
    return result


def _dependent(schema: Schema) -> list[Schema]:
    """A schema for each property that needs others: it is missing, or they are present."""
    found = []
    for keyword in ("dependentRequired", "dependencies", "dependentSchemas"):
        needed = schema.get(keyword, {})
        if not isinstance(needed, dict):
            raise _left_out(keyword)
        for name, others in needed.items():
            if others == [] or keyword != "dependentRequired" and not isinstance(others, list):
                continue  # grammar_schema handles dependencies that are schemas
            if keyword == "dependentSchemas" or not are_names(others):
                raise _left_out(keyword)
            found.append({"anyOf": [without(name), {"required": [name, *others]}]})
            if len(found) > MAX_DEPENDENT or schema.get("type") != "object":
                raise RewriteError(
                    keyword,
                    f"{keyword} cannot be enforced but in a schema with the type object, for "
                    f"{MAX_DEPENDENT} properties at most: leave it out",
                )
    return found


def _negated(schema: Schema) -> list[Schema]:
    """A `not` of an object with some required properties becomes: one of them is missing."""
    negated = schema.get("not", False)
    if negated is False:
        return []
    if not isinstance(negated, dict) or negated.keys() - NOTES - {"type"} != {"required"}:
        raise _left_out("not")
    names = negated["required"]
    is_plain = negated.get("type", "object") == schema.get("type") == "object"
    if not is_plain or not are_names(names) or not 0 < len(names) <= MAX_CHOICES:
        raise _left_out("not")
    return [{"anyOf": list(map(without, names))}]


def without(name: str) -> Schema:
    return {"properties": {name: False}}


def are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _unique_items(schema: Schema, result: Schema, follow: Callable[[object], object]) -> Schema:
    least, most = result.get("minItems", 0), result.get("maxItems")
    if most is not None and most <= 1:
        return result
    known = {"type", "items", "minItems", "maxItems", "uniqueItems"}
    values = values_of(follow(schema.get("items")))
    is_plain = schema.get("type") == "array" and not schema.keys() - NOTES - known
    if values is None or not is_plain:
        raise RewriteError(
            "uniqueItems",
            "uniqueItems cannot be enforced but in an array with nothing else than items that are "
            "a few values (enum), or with a maxItems of 1: leave it out",
        )
    lengths = range(least, min(len(values), len(values) if most is None else most) + 1)
    num_lists = 0
    for length in lengths:
        num_lists += perm(len(values), length)
        if num_lists > MAX_LISTS:
            raise RewriteError(
                "uniqueItems",
                f"there are more than {MAX_LISTS} lists of different items, for which uniqueItems "
                "cannot be enforced: give a smaller maxItems, or leave it out",
            )
    if not num_lists:
        raise RewriteError("minItems", f"there are no {least} different items")
    return {"enum": [list(some) for length in lengths for some in permutations(values, length)]}


def values_of(schema: object) -> list[Any] | None:
    """All values that a schema allows, each once; None if it does not list them, or lists others
    than strings, integers, booleans and null.
    """
    if not isinstance(schema, dict) or schema.keys() - NOTES - {"type", "enum", "const"}:
        return None
    several = {"boolean": [True, False], "null": [None]}.get(str(schema.get("type")))
    if "enum" in schema:
        several = schema["enum"]
    if "const" in schema:
        several = [schema["const"]]
    if not isinstance(several, list) or "enum" in schema and "const" in schema:
        return None
    types = schema.get("type", list(_TYPES))
    allowed = {kind for name in (types if isinstance(types, list) else [types])
               for kind in _TYPES.get(str(name), ())}  # fmt: skip
    if any(type(value) not in (str, int, bool, type(None)) for value in several):
        return None
    fitting = {(type(value), value): value for value in several if type(value) in allowed}
    return list(fitting.values())


def _allows_all_names(names: object) -> bool:
    if not isinstance(names, dict):
        return names is True
    return not names.keys() - NOTES - {"type"} and names.get("type", "string") == "string"


def _names_pattern(names: object) -> object:
    """A pattern for the names of properties; None if the schema cannot be written as one."""
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return None
    asked = names.keys() - NOTES - {"type"}
    if asked == {"pattern"}:
        return names["pattern"]
    if asked == {"format"}:
        return format_pattern(names["format"])
    if asked and not asked - {"minLength", "maxLength"}:
        least, most = names.get("minLength", 0), names.get("maxLength", "")
        lengths = [length for length in (least, most) if length != ""]
        if all(type(length) is int and 0 <= length <= MAX_NAME_LENGTH for length in lengths):
            return rf"^[\s\S]{{{least},{most}}}$"
    texts = [text for text in values_of(names) or () if isinstance(text, str)]
    escaped = [_SYNTAX.sub(r"\\\g<0>", text) for text in texts]
    return f"^(?:{'|'.join(escaped)})$" if escaped else None


def _joined(schemas: Mapping[str, Schema | bool]) -> dict[str, Schema | bool]:
    """Patterns that have the same schema, joined into one: the engine needs them disjoint."""
    alike: dict[str, list[str]] = {}
    for pattern, schema in schemas.items():
        alike.setdefault(json.dumps(schema, sort_keys=True), []).append(pattern)
    joined = {}
    for some in alike.values():
        pattern = "|".join(f"(?:{one})" for one in some) if len(some) > 1 else some[0]
        joined[pattern] = schemas[some[0]]
    return joined


def _one_required(schema: Schema, result: Schema) -> Schema:
    branches = result.get("oneOf", ())
    names = [branch["required"][0] for branch in branches if _is_one_name(branch)]
    if not 1 < len(set(names)) == len(branches) <= MAX_CHOICES or schema.get("type") != "object":
        return result
    choices = [
        {"required": [name], "properties": {other: False for other in names if other != name}}
        for name in names
    ]
    kept = {keyword: value for keyword, value in result.items() if keyword != "oneOf"}
    return {**kept, "allOf": [*kept.get("allOf", ()), {"anyOf": choices}]}


def _is_one_name(branch: Schema | bool) -> bool:
    if not isinstance(branch, dict) or branch.get("type", "object") != "object":
        return False
    return branch.keys() - {"type"} == {"required"} and len(branch["required"]) == 1
