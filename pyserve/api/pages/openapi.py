"""/openapi.json: the OpenAPI 3.1 document, made from the table in operations.py and the wire types.

Fields that features.py lists as not built are left out, so a field appears here once it works.
wire/fields.py has what the types do not say of a field, such as bounds and descriptions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from pyserve import __version__
from pyserve.api.endpoints.query import parameters_of
from pyserve.api.pages import site
from pyserve.api.pages.operations import OPERATIONS, Operation
from pyserve.api.wire.fields import BOUNDS, DESCRIPTIONS, REPLACED
from pyserve.api.wire.messages import (
    MESSAGES_SENT,
)
from pyserve.api.wire.pooling import (
    TextDocument,
)
from pyserve.api.wire.protocol import (
    ContentPart,
    Message,
    StreamOptions,
)
from pyserve.api.wire.tools import SENT
from pyserve.features import Field, fields_of

Schema = dict[str, Any]


_WITHOUT_EFFECT = "Accepted without effect; named in the header x-pyserve-ignored."
_ERRORS = {
    400: "A value is missing, has a wrong type, is out of range or is not supported",
    401: "The API key is missing or wrong",
    404: "The model or object that the request names does not exist",
    413: "The body is too large",
    429: "The queue is full: try again later",
    500: "The server failed to answer the request",
    503: "The server is starting or shutting down, or the request took too long",
}
_RETRYING = (429, 503)
_FORM: Schema = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["purpose", "file"],
                "properties": {
                    "purpose": {"const": "batch"},
                    "file": {"type": "string", "format": "binary"},
                },
            }
        }
    },
}
_REF = "#/components/schemas/{name}"


class Document:
    """The document of one server, built when it is first requested.

    routes   (method, path) -> whether the route is public, as in app.py.
    has_key  the server has API keys, so that routes that are not public need one.
    """

    def __init__(
        self, routes: Mapping[tuple[str, str], bool], *, root_path: str, has_key: bool
    ) -> None:
        self._routes = {(method, _plain(path)): public for (method, path), public in routes.items()}
        self._root_path = root_path
        self._has_key = has_key

    @functools.cached_property
    def file(self) -> site.File:
        """The document as a file to send."""
        return site.make_file(msgspec.json.encode(self.describe()), ".json")

    def describe(self) -> Schema:
        """The document as JSON values."""
        paths: dict[str, Schema] = {}
        for (method, path), operation in OPERATIONS.items():
            if (method, path) in self._routes:
                item = paths.setdefault(path, {})
                item[method.lower()] = self._operation(method, path, operation)
        document: Schema = {
            "openapi": "3.1.0",
            "info": {
                "title": "pyserve",
                "version": __version__,
                "description": "OpenAI-compatible inference on one GPU.",
            },
            "paths": paths,
            "components": {
                "schemas": schemas(),
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        }
        if self._root_path:
            document["servers"] = [{"url": self._root_path}]
        return document

    def _operation(self, method: str, path: str, operation: Operation) -> Schema:
        is_guarded = self._has_key and not self._routes[method, path]
        described: Schema = {
            "operationId": _operation_id(method, path),
            "summary": operation.summary,
            "security": [{"bearer": []}, {"x-api-key": []}] if is_guarded else [],
            "responses": {
                str(status): _reply(operation, wire_type)
                for status, wire_type in operation.replies.items()
            },
        }
        errors = {401} if is_guarded else set()
        if path.startswith("/v1") or operation.body is not None:
            errors |= {500, 503}
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", path)
        ]
        if parameters:
            errors.add(404)
        if operation.query is not None:
            errors.add(400)
            parameters += _query_parameters(operation.query)
        if parameters:
            described["parameters"] = parameters
        if operation.is_form:
            errors |= {400, 413}
            described["requestBody"] = _FORM
        if operation.body is not None:
            errors |= {400, 404, 413}
            described["requestBody"] = {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": _reference(operation.body),
                        "example": operation.example,
                    }
                },
            }
        if operation.chunks or operation.is_queued:
            errors.add(429)
        described["responses"].update(
            (str(status), _error(status, operation.error)) for status in sorted(errors)
        )
        return described


DOCUMENT = web.AppKey("document", Document)


async def openapi(request: web.Request) -> web.StreamResponse:
    return site.reply(request, request.app[DOCUMENT].file)


def schemas() -> dict[str, Schema]:
    """components.schemas: the JSON schemas of all wire types, without fields that are not built."""
    types: set[type[msgspec.Struct]] = set()
    for operation in OPERATIONS.values():
        types |= {operation.error, *operation.chunks}
        types.update(filter(None, (operation.body, *operation.replies.values())))
    ordered = sorted(types, key=lambda wire_type: wire_type.__name__)
    _, found = msgspec.json.schema_components(ordered, ref_template=_REF)
    sent: list[type[msgspec.Struct]] = [
        StreamOptions, Message, ContentPart, TextDocument, *SENT, *MESSAGES_SENT,
    ]  # fmt: skip
    sent += [operation.body for operation in OPERATIONS.values() if operation.body]
    rows = {wire_type.__name__: fields_of(wire_type) for wire_type in sent}
    for name, schema in found.items():
        if name in rows:
            _finish_sent(schema, rows[name])
        elif name != "NotReady":  # a reply always has its fields with defaults, unless UNSET
            always = schema.get("required", [])
            schema["required"] = [
                field for field, value in schema["properties"].items()
                if field in always or "default" in value
            ]  # fmt: skip
    for name, replaced in REPLACED.items():
        properties = {**found[name]["properties"], **replaced.get("properties", {})}
        found[name].update({**replaced, "properties": properties})
    return found


def _finish_sent(schema: Schema, rows: Mapping[str, Field]) -> None:
    """Finish the schema of a request type: drop fields not built, add bounds and descriptions."""
    properties: dict[str, Schema] = schema["properties"]
    del schema["additionalProperties"]  # unknown fields are not refused, only named in a header
    for name in [name for name, row in rows.items() if not row.is_ignored]:
        del properties[name]
    for name, value in properties.items():
        for variant in value.get("anyOf", [value]):
            variant.update(BOUNDS.get(name, {}).get(variant.get("type", ""), {}))
        if name in rows:
            value["description"] = _WITHOUT_EFFECT
        elif name in DESCRIPTIONS:
            value["description"] = DESCRIPTIONS[name]


def _query_parameters(wire_type: type[msgspec.Struct]) -> list[Schema]:
    return [
        {
            "name": name,
            "in": "query",
            "description": schema["description"],
            "schema": {key: value for key, value in schema.items() if key != "description"},
        }
        for name, schema in parameters_of(wire_type).items()
    ]


def _reply(operation: Operation, wire_type: type[msgspec.Struct] | None) -> Schema:
    headers = {
        "X-Request-Id": _header("The id that the client sent in this header, or a new one"),
        "x-pyserve-ignored": _header(
            "The names of the request's fields and query parameters that had no effect"
        ),
    }
    if wire_type is None:
        content: Schema = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _reference(wire_type)}}
    described: Schema = {"description": "The answer", "headers": headers, "content": content}
    if operation.body is not None:
        headers["x-pyserve-merged"] = _header(
            "How messages were changed for a chat template that does not accept their order. "
            "system: system messages became messages of the user. turns: messages were joined or "
            "reordered."
        )
    if operation.chunks:
        headers["x-pyserve-clamped"] = _header(
            "max_tokens=N if the request asked for more tokens than the prompt leaves room for in "
            "the context: the answer may have N tokens"
        )
    if operation.chunks:
        words = operation.stream.format(
            chunks=" or ".join(chunk.__name__ for chunk in operation.chunks),
            error=operation.error.__name__,
        )
        described["description"] = (
            "The answer. With `stream: true` it is sent as server-sent events. "
            f"{words} Lines that begin with a colon are comments, which keep proxies from closing "
            "the connection."
        )
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    return described


def _error(status: int, wire_type: type[msgspec.Struct]) -> Schema:
    described: Schema = {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": _reference(wire_type)}},
    }
    if status in _RETRYING:
        described["headers"] = {"Retry-After": _header("Seconds", "integer")}
    return described


def _header(description: str, kind: str = "string") -> Schema:
    return {"description": description, "schema": {"type": kind}}


def _reference(wire_type: type[msgspec.Struct]) -> Schema:
    return {"$ref": _REF.format(name=wire_type.__name__)}


def _plain(path: str) -> str:
    return path.replace("{model:.+}", "{model}")


def _operation_id(method: str, path: str) -> str:
    words = "".join(char if char.isalnum() else "_" for char in path)
    return f"{method.lower()}{words}".rstrip("_")
