"""Argument values of Qwen3-Coder's calls: bare text -> the JSON that the tool's schema asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pyserve.text.tool_parsers.json_text import quoted
from pyserve.text.tool_parsers.python_text import json_of

END_VALUE = "</parameter>"


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows; empty if it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    said = schema.get("type")
    if isinstance(said, str):
        return frozenset([said])
    if isinstance(said, list):
        return frozenset(name for name in said if isinstance(name, str))
    if isinstance(schema.get("enum"), list):
        kinds = {_type_of(value) for value in schema["enum"]}
        return frozenset(kinds)
    several = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(several, list):
        return frozenset().union(*(types_of(one) for one in several[:64]))
    return frozenset()


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return names.get(type(value), "array" if isinstance(value, list) else "object")


def as_json(value: str, types: frozenset[str]) -> str:
    """The value as JSON of one of these types, if it can be read so; otherwise as a JSON string."""
    text = value.strip()
    found = _json_in(text)
    if found is not None:
        kind = _type_of(msgspec.json.decode(found))
        is_number = kind == "integer" and "number" in types
        if kind in types or is_number or not types and kind != "string":
            return found
    return f'"{quoted(value.removeprefix(chr(10)).removesuffix(chr(10)))}"'


def _json_in(text: str) -> str | None:
    """The text itself if it is JSON, or the JSON of the Python literal that it is; None for any
    other text.
    """
    for candidate in (text, json_of(text)):
        try:
            if candidate is not None:
                msgspec.json.decode(candidate)
                return candidate
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            continue
    return None
