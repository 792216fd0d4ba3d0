"""The string formats of JSON Schema that are enforced, each by a pattern."""

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
# The engine's own pattern allows 29 February in every year.
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
# The engine's own pattern allows a leap second in every minute, and fractions of any length.
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)

_BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_HEX = "[0-9a-fA-F]"


def _uuid(third: str, fourth: str = "[89abAB]") -> str:
    """A pattern for UUIDs; third, fourth: patterns for the first digit of these groups."""
    return f"^{_HEX}{{8}}-{_HEX}{{4}}-{third}{_HEX}{{3}}-{fourth}{_HEX}{{3}}-{_HEX}{{12}}$"


# Name of a format -> its pattern; None where the grammar engine's own pattern is right.
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
    "byte": _BASE64,  # OpenAPI's name for base64
    # Names that pydantic uses.
    **{f"uuid{version}": _uuid(str(version)) for version in (1, 3, 4, 5, 6, 7, 8)},
}

# Formats of OpenAPI and pydantic that every string has.
ANY_STRING = frozenset(("password", "binary", "path", "file-path", "directory-path"))
# Formats of JSON Schema that are not enforced, and therefore refused.
STANDARD = frozenset(
    "idn-email idn-hostname uri-reference iri iri-reference uri-template regex".split()
)


def format_pattern(name: object) -> str | None:
    """A pattern for a string format; None if FORMATS has none."""
    if not isinstance(name, str):
        return None
    return _uuid(_HEX, _HEX) if name == "uuid" else FORMATS.get(name)


def format_schema(name: object, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema that enforces a string format; {} where it is a note only; None if it is refused.

    schema  the schema that has the format. Beside a pattern, a name that no standard knows is a
            note: Zod writes there where the pattern comes from.
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
