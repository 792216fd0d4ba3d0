"""The formats of strings that are enforced. None: the grammar engine's own expression is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_BY_4 = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP_YEAR = f"(?:[0-9]{{2}}{_BY_4}|{_BY_4}00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
# The engine's lets 29 February be in every year.
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
# The engine's lets every minute have a leap second, and a fraction never end.
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)

_BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_HEX = "[0-9a-fA-F]"


def _uuid(third: str, fourth: str = "[89abAB]") -> str:
    """Of the given first digits of the third and fourth group."""
    return f"^{_HEX}{{8}}-{_HEX}{{4}}-{third}{_HEX}{{3}}-{fourth}{_HEX}{{3}}-{_HEX}{{12}}$"


FORMATS: Mapping[str, str | None] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "duration": None,
    "email": None,
    "hostname": None,
    "ipv4": None,
    "ipv6": None,
    "uuid": None,
    "uri": None,
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(?:0|[1-9][0-9]*)(?:[+-][1-9][0-9]*)?(?:#|{_POINTER})$",
    "base64": _BASE64,
    "byte": _BASE64,  # OpenAPI's word
    **{f"uuid{version}": _uuid(str(version)) for version in (1, 3, 4, 5, 6, 7, 8)},  # pydantic's
}

# Of OpenAPI and pydantic: every string is one.
ANY_STRING = frozenset(("password", "binary", "path", "file-path", "directory-path"))
# Of JSON Schema, and not enforced.
STANDARD = frozenset(
    "idn-email idn-hostname uri-reference iri iri-reference uri-template regex".split()
)


def format_pattern(name: object) -> str | None:
    """A pattern for a format of strings; None: there is none."""
    if not isinstance(name, str):
        return None
    return _uuid(_HEX, _HEX) if name == "uuid" else FORMATS.get(name)


def format_schema(name: object, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """What enforces a format of strings in a schema; None: it cannot be enforced.

    Names that no standard has are notes beside a pattern: Zod says by them how it came to that.
    """
    if not isinstance(name, str):
        return None
    if name in FORMATS:
        pattern = FORMATS[name]
        return {"format": name} if pattern is None else {"allOf": [{"pattern": pattern}]}
    parts = schema.get("allOf")
    beside = [schema, *(parts if isinstance(parts, list) else ())]
    has_pattern = any(isinstance(part, dict) and "pattern" in part for part in beside)
    is_note = name in ANY_STRING or has_pattern and name not in STANDARD
    return {} if is_note else None
