"""Values and property names of a schema, shortened for error messages."""

from __future__ import annotations

from pyserve.text.grammar_references import escaped

MAX_SHOWN = 60  # length of a value or name


def shown(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value) if not isinstance(value, str) else f'"{value[: MAX_SHOWN + 1]}"'
    return text if len(text) <= MAX_SHOWN + 2 else text[:MAX_SHOWN] + "..."


def part_of_pointer(name: str) -> str:
    return escaped(name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "...")
