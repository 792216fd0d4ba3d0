"""Tool calls as structural tags, from which text/grammar_tags.py makes the grammar for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyserve.text.tool_parsers.arguments import UnsayableError, check_sayable
from pyserve.text.tool_parsers.written import NAME, Written

Tag = dict[str, Any]

# Keywords that may allow further properties of the same object.
_COMBINED = frozenset(
    "$ref $dynamicRef $recursiveRef anyOf oneOf allOf if dependentSchemas dependencies "
    "patternProperties unevaluatedProperties".split()
)


def must_call(
    written: Written, parameters: Mapping[str, Mapping[str, Any]], *, is_single: bool
) -> Tag:
    """A tag that allows nothing but calls, at least one.

    written     how the model writes calls.
    parameters  tool name -> JSON schema of its arguments.
    is_single   at most one call.
    """
    return _whole(written, parameters, is_single=is_single)


def may_call(
    written: Written, parameters: Mapping[str, Mapping[str, Any]], *, is_single: bool
) -> Tag:
    """A tag that allows any text, but in which whatever begins like a call must be one. A call is
    recognised by its trigger, or at the start of the answer if the form has none.
    """
    trigger = written.trigger
    if not trigger:
        calls = _whole(written, parameters, is_single=is_single)
        text = {"type": "regex", "pattern": rf"[ \t\r\n]*([^ \t\r\n\{written.bare}](.|\n)*)?"}
        return {"type": "or", "elements": [calls, text]}
    if written.around[0]:
        whole = _whole(written, parameters, is_single=is_single, begun=trigger)
        tags = [{"begin": trigger, "content": whole, "end": ""}]
    else:
        # Text before the trigger, which counts as free text here.
        begun = written.call[0].partition(trigger)[0]
        tags = _calls(written, parameters, begun=begun)
    return {"type": "triggered_tags", "triggers": [trigger], "tags": tags}


def _whole(
    written: Written,
    parameters: Mapping[str, Mapping[str, Any]],
    *,
    is_single: bool,
    begun: str = "",
) -> Tag:
    """All calls with the text around them, without its beginning `begun`."""
    calls = {
        "type": "tags_with_separator",
        "tags": _calls(written, parameters),
        "separator": written.between,
        "at_least_one": True,
        "stop_after_first": is_single,
    }
    before, behind = written.around
    texts = [_text(before.removeprefix(begun)), calls, _text(behind)]
    return {"type": "sequence", "elements": [one for one in texts if one is not None]}


def without_words(written: Written, parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name of each function whose calls cannot be held to this form -> why."""
    found = {}
    for name, schema in parameters.items():
        try:
            check_sayable(written.form, name, _as_object(schema))
        except UnsayableError as error:
            found[name] = str(error)
    return found


def _calls(
    written: Written, parameters: Mapping[str, Mapping[str, Any]], *, begun: str = ""
) -> list[Tag]:
    begin, end = written.call
    kind = {"type": "json_schema"}
    if written.form != "json":
        kind = {"type": "arguments", "form": written.form}
    return [
        {
            "begin": begin.removeprefix(begun).replace(NAME, name),
            "content": {**kind, "json_schema": _as_object(schema)},
            "end": end,
        }
        for name, schema in parameters.items()
    ]


def _text(value: str) -> Tag | None:
    return {"type": "const_string", "value": value} if value else None


def _as_object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema with the type object, and without properties that it does not list: the client
    would not know what to do with those. A schema with combined parts stays as it is.
    """
    if _COMBINED & schema.keys():
        return schema
    if "properties" in schema:
        schema = {"additionalProperties": False, **schema}
    return {"type": "object", **schema}
