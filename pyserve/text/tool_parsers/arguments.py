"""How arguments of calls are written in forms other than one JSON object.

    python  city="Paris", days=2
            Values are JSON, all of which Python's literals can express.
    tags    <parameter=city>\\nParis\\n</parameter>\\n<parameter=days>\\n2\\n</parameter>\\n
            Strings are written bare, other values as JSON.

Not every schema can be expressed in these forms; UnsayableError says why. The grammar that holds a
model to a form is made in text/grammar_tags.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pyserve.text.grammar_references import REFERENCES
from pyserve.text.grammar_rewrites import NOTES
from pyserve.text.tool_parsers.tagged_values import END_VALUE, as_json, types_of

Form = Literal["json", "python", "tags"]
Schema = Mapping[str, Any]

MAX_MEMBERS = 200  # arguments of one call
MAX_FOLLOWED = 8  # length of a chain of references
_FUNCTION_NAME = {"python": re.compile(r"[A-Za-z0-9_.]+"), "tags": re.compile(r"[^<>\n]+")}
_NAME = {
    "python": re.compile(r"[A-Za-z_][A-Za-z0-9_]*"),
    "tags": re.compile(r"[^<>\s](?:[^<>\n]*[^<>\s])?"),
}
_IN_DEFINITIONS = re.compile(r"#(?:/\$defs/|/definitions/|[^/])")
_LISTED: Mapping[str, list[Any]] = {"boolean": [True, False], "null": [None]}


class UnsayableError(ValueError):
    """A name or a schema that cannot be expressed in a form, and why."""


@dataclass(frozen=True, slots=True)
class Member:
    """One argument of a function.

    schema   schema of the value, where that is written as JSON.
    texts    all possible values as they are written bare.
    is_text  the value is any bare text.
    """

    name: str
    is_needed: bool
    schema: Any = None
    texts: tuple[str, ...] = ()
    is_text: bool = False


def written_arguments(form: Form, arguments: str) -> str:
    """A JSON object of arguments in this form; anything else than an object as it is."""
    try:
        values = json.loads(arguments)
    except ValueError:
        return arguments
    if form == "json" or not isinstance(values, dict):
        return arguments
    if form == "python":
        return ", ".join(f"{name}={_json(value)}" for name, value in values.items())
    return "".join(
        f"<parameter={name}>\n{_bare(value)}\n{END_VALUE}\n" for name, value in values.items()
    )


def members_of(form: Form, schema: Schema) -> list[Member] | None:
    """The arguments that a schema lists, in their order; None if it allows any. Raises
    UnsayableError.
    """
    known = {"type", "properties", "required", "additionalProperties"}
    if schema.keys() - NOTES - known or schema.get("type", "object") != "object":
        raise UnsayableError("arguments must be an object that has nothing but properties")
    properties, needed = schema.get("properties"), schema.get("required", [])
    others = schema.get("additionalProperties", True)
    if properties is None and not needed and others is True:
        return None
    if not isinstance(properties, dict) or not set(needed) <= properties.keys():
        raise UnsayableError("each property must have a schema")
    if len(properties) > MAX_MEMBERS:
        raise UnsayableError(f"there are more than {MAX_MEMBERS} properties")
    members = []
    for name, inner in properties.items():
        if not _NAME[form].fullmatch(name):
            raise UnsayableError(f"the property {name[:80]} cannot be written in this form")
        make = _tagged if form == "tags" else _as_json
        members.append(make(name, name in needed, inner, schema))
    return members


def check_sayable(form: Form, name: str, schema: Schema) -> None:
    """Raise UnsayableError if calls of a function cannot be restricted to this form by
    a grammar.
    """
    if form == "json":
        return
    if not _FUNCTION_NAME[form].fullmatch(name):
        raise UnsayableError(f"the name {name[:80]} cannot be written in this form")
    members_of(form, schema)


def _as_json(name: str, is_needed: bool, schema: Any, root: Schema) -> Member:
    if isinstance(schema, dict):
        _check_references(name, schema)
        definitions = {word: root[word] for word in ("$defs", "definitions") if word in root}
        schema = {**schema, **definitions}
    return Member(name, is_needed, schema)


def _check_references(name: str, schema: Any) -> None:
    """Raise UnsayableError unless all references lead into the definitions or to an anchor, because
    the property's schema is used without the schema around it.
    """
    stack = [schema]
    while stack:
        inner = stack.pop()
        if isinstance(inner, list):
            stack += inner
        if not isinstance(inner, dict):
            continue
        stack += inner.values()
        for keyword in REFERENCES:
            where = inner.get(keyword)
            if isinstance(where, str) and not _IN_DEFINITIONS.match(where):
                raise UnsayableError(f"{where[:80]} in {name[:80]} leads out of the definitions")


def _tagged(name: str, is_needed: bool, schema: Any, root: Schema) -> Member:
    types = types_of(schema)  # the types by which the parser reads the value
    followed = _followed(schema, root)
    values = _values(followed, root)
    if values is not None:
        for value in values:
            text = _bare(value)
            read = text if types == {"string"} else json.loads(as_json(text, types))
            if read != value or type(read) is not type(value) or END_VALUE in text:
                raise UnsayableError(f"the value {text[:80]} of {name[:80]} cannot be written bare")
        return Member(name, is_needed, texts=tuple(map(_bare, values)))
    if "string" in types and types == _plain_types(followed):
        return Member(name, is_needed, is_text=True)
    if _is_never_text(followed, root):
        return _as_json(name, is_needed, schema, root)
    raise UnsayableError(f"the schema of {name[:80]} restricts a text that is written bare")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _followed(schema: Any, root: Schema) -> Any:
    """The schema that a chain of plain references leads to; any other schema as it is."""
    for _ in range(MAX_FOLLOWED):
        if not isinstance(schema, dict) or schema.keys() - NOTES != {"$ref"}:
            break
        kind, _, name = str(schema["$ref"]).removeprefix("#/").partition("/")
        definitions = root.get(kind)
        schema = definitions.get(name) if isinstance(definitions, dict) else None
    return schema


def _several(schema: Any, root: Schema) -> list[Any]:
    """The branches of a schema that consists of an anyOf; for any other schema, itself alone."""
    schema = _followed(schema, root)
    is_choice = isinstance(schema, dict) and schema.keys() - NOTES == {"anyOf"}
    branches = schema["anyOf"] if is_choice else None
    if not isinstance(branches, list) or not branches:
        return [schema]
    return [_followed(branch, root) for branch in branches]


def _values(schema: Any, root: Schema) -> list[Any] | None:
    """All values of a schema that lists them; None if it does not."""
    values: list[Any] = []
    for branch in _several(schema, root):
        asked = branch.keys() - NOTES if isinstance(branch, dict) else set()
        listed = None
        if asked == {"type"}:
            listed = _LISTED.get(str(branch["type"]))
        elif asked - {"type"} in ({"enum"}, {"const"}):
            listed = branch.get("enum", [branch.get("const")])
        if not isinstance(listed, list) or not listed:
            return None
        values += listed
    return values


def _plain_types(schema: Any) -> frozenset[str]:
    """The types of a schema that restricts nothing but the type; empty for any other schema."""
    several = _several(schema, {})
    is_plain = all(isinstance(one, dict) and one.keys() - NOTES == {"type"} for one in several)
    return frozenset().union(*map(types_of, several)) if is_plain else frozenset()


def _is_never_text(schema: Any, root: Schema) -> bool:
    for branch in _several(schema, root):
        types = types_of(branch) if isinstance(branch, dict) and "type" in branch else frozenset()
        if not types or "string" in types:
            return False
    return True
