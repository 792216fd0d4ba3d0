"""Query parameters: the query string -> a wire type, and the names of those without effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar, get_type_hints

import msgspec
from aiohttp import web

from pyserve.api.endpoints.body import ignored_header
from pyserve.api.wire.batches import BatchList, FileList
from pyserve.api.wire.queries import ListQuery
from pyserve.api.wire.responses_answer import InputItems
from pyserve.errors import InvalidRequestError

MAX_SHOWN_CHARS = 50  # of a wrong value in an error
# The parameters that the endpoint of a request knows; missing if it knows none.
_KNOWN = web.RequestKey("known_parameters", frozenset)

Schema = dict[str, Any]
Q = TypeVar("Q", bound=msgspec.Struct)
L = TypeVar("L", FileList, BatchList, InputItems)


def read_query(request: web.Request, wire_type: type[Q]) -> Q:
    """The query parameters of `request`. Only those that are lists may be given several times.

    Raises InvalidRequestError naming the parameter, its value and what is allowed.
    """
    schemas = parameters_of(wire_type)
    types = _types_of(wire_type)
    request[_KNOWN] = frozenset(schemas)
    values: dict[str, Any] = {}
    for name, schema in schemas.items():
        given = request.query.getall(name, [])
        if not given:
            continue
        is_list = schema.get("type") == "array"
        if len(given) > 1 and not is_list:
            raise InvalidRequestError(f"{name} must be given once, got {len(given)} values", name)
        try:
            value = given if is_list else given[0]
            values[name] = msgspec.convert(value, types[name], strict=False)
        except msgspec.ValidationError:
            shown = ", ".join(given)[:MAX_SHOWN_CHARS]
            raise InvalidRequestError(
                f"{name} must be {_allowed(schema)}, got {shown}", name
            ) from None
    return wire_type(**values)


@cache
def parameters_of(wire_type: type[msgspec.Struct]) -> dict[str, Schema]:
    """Name of each parameter -> the JSON schema of its values, without null: that is no value in a
    query string."""
    _, components = msgspec.json.schema_components([wire_type])
    schemas: dict[str, Schema] = components[wire_type.__name__]["properties"]
    for schema in schemas.values():
        schema.update(schema.pop("anyOf", [{}])[0])
        if schema["default"] is None:
            del schema["default"]
    return schemas


@cache
def _types_of(wire_type: type[msgspec.Struct]) -> dict[str, Any]:
    return get_type_hints(wire_type, include_extras=True)


def name_unknown_parameters(request: web.Request, response: web.StreamResponse) -> None:
    """Add the query parameters that the endpoint does not know to the header of what is ignored."""
    known = request.get(_KNOWN, frozenset())
    unknown = ignored_header([name for name in request.query if name not in known])
    for header, names in unknown.items():
        told = response.headers.get(header)
        response.headers[header] = names if told is None else f"{told}, {names}"


def part_of(
    reply: type[L], newest_first: Sequence[Any], id_of: Callable[[Any], str], query: ListQuery
) -> L:
    """The reply with the part of a list that `query` asks for.

    reply  the wire type of the reply.
    id_of  returns the id of an item.

    Raises InvalidRequestError if no item has the id `query.after`.
    """
    items = newest_first if query.order == "desc" else newest_first[::-1]
    ids = [id_of(item) for item in items]
    start = 0
    if query.after is not None:
        if query.after not in ids:
            raise InvalidRequestError(f"after: nothing has the id {query.after[:80]}", "after")
        start = ids.index(query.after) + 1
    end = start + query.limit
    shown = ids[start:end]
    return reply(
        data=list(items[start:end]),
        first_id=shown[0] if shown else None,
        last_id=shown[-1] if shown else None,
        has_more=end < len(items),
    )


def _allowed(schema: Schema) -> str:
    """What the values of `schema` are, for the end of "must be"."""
    values = schema.get("items", schema)
    if "enum" in values:
        return " or ".join(map(str, values["enum"]))
    if values["type"] == "boolean":
        return "true or false"
    return f"in [{values['minimum']}, {values['maximum']}]"
