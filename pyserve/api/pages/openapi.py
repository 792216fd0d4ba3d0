"""/openapi.json: the OpenAPI 3.1 document, made from the wire types.

Fields that features.py lists as not built are left out, so a field appears here once it works.
wire/fields.py has what the types do not say of a field, such as bounds and descriptions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import msgspec
from aiohttp import web

from pyserve import __version__
from pyserve.api.endpoints.models import Model, ModelList
from pyserve.api.pages import site
from pyserve.api.wire.adapters import LoadAdapterRequest, UnloadAdapterRequest
from pyserve.api.wire.batches import (
    Batch,
    BatchList,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
)
from pyserve.api.wire.fields import BOUNDS, DESCRIPTIONS, REPLACED
from pyserve.api.wire.messages import (
    MESSAGES_SENT,
    CountTokensRequest,
    CountTokensResponse,
    MessagesErrorResponse,
    MessagesEvent,
    MessagesRequest,
    MessagesResponse,
)
from pyserve.api.wire.pooling import (
    EmbeddingRequest,
    EmbeddingResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
    TextDocument,
)
from pyserve.api.wire.protocol import (
    AbortRequest,
    ChatChunk,
    ChatRequest,
    ChatResponse,
    CompletionChunk,
    CompletionRequest,
    CompletionResponse,
    ContentPart,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    Message,
    StreamOptions,
    TokenizeRequest,
    TokenizeResponse,
)
from pyserve.api.wire.replies import (
    Aborted,
    Awake,
    Done,
    IsSleeping,
    Live,
    Load,
    NotReady,
    Ready,
    Sleeping,
    Version,
)
from pyserve.api.wire.responses import ResponsesRequest
from pyserve.api.wire.responses_answer import (
    Deleted,
    Event,
    InputItems,
    InputTokens,
    Response,
)
from pyserve.api.wire.tools import SENT
from pyserve.features import Field, fields_of

Schema = dict[str, Any]


_CHUNKS = (
    "server-sent events, each a line `data: ` and a {chunks}, at the end `data: [DONE]`. Where it "
    "fails on the way, one frame holds an {error}."
)
_EVENTS = (
    "server-sent events, each a line `event: `, which names its type, and a line `data: ` with a "
    "{chunks}; the last one has the whole response. Where it fails on the way, the last two are "
    "response.failed and error."
)
_MESSAGE_EVENTS = (
    "server-sent events: `event: ` with its type, and `data: ` with one of {chunks}. Where it "
    "fails on the way, the last one is `error`, an {error}; while nothing comes there are pings."
)


class Operation(NamedTuple):
    """A route in the document.

    replies    status -> wire type of the response; None: plain text. Errors are not included.
    body       wire type of the request body; None: there is none.
    chunks     wire types of the events of a streamed response; empty: it cannot be streamed.
    example    an example of the request body.
    stream     description of the streamed response, in which {chunks} and {error} are replaced.
    error      wire type of an error.
    is_form    the request body is a form with a file.
    is_queued  its requests wait for the model and can be refused with 429, like streamed ones.
    """

    summary: str
    replies: Mapping[int, type[msgspec.Struct] | None]
    body: type[msgspec.Struct] | None = None
    chunks: tuple[type[msgspec.Struct], ...] = ()
    example: Mapping[str, object] | None = None
    stream: str = _CHUNKS
    error: type[msgspec.Struct] = ErrorResponse
    is_form: bool = False
    is_queued: bool = False


def _ranking(summary: str) -> Operation:
    documents = ["Paris is the capital of France.", "The sky is blue."]
    example = {"query": "What is the capital of France?", "documents": documents}
    return Operation(summary, {200: RerankResponse}, RerankRequest, example=example, is_queued=True)


def _scoring(summary: str) -> Operation:
    example = {"queries": "What is the capital of France?", "documents": ["Paris", "A cat"]}
    return Operation(summary, {200: ScoreResponse}, ScoreRequest, example=example, is_queued=True)


_HEALTH = Operation("200 where a request would be taken now", {200: Ready, 503: NotReady})
_HELLO = [{"role": "user", "content": "What is the capital of France?"}]
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/chat/completions"): Operation(
        "Answer a conversation", {200: ChatResponse}, ChatRequest, (ChatChunk,),
        {"messages": _HELLO, "max_tokens": 64},
    ),
    ("POST", "/v1/completions"): Operation(
        "Continue a text", {200: CompletionResponse}, CompletionRequest, (CompletionChunk,),
        {"prompt": "The capital of France is", "max_tokens": 16},
    ),
    ("POST", "/v1/responses"): Operation(
        "Answer a conversation, in OpenAI's newer words", {200: Response}, ResponsesRequest,
        (Event,), {"input": "What is the capital of France?", "max_output_tokens": 64}, _EVENTS,
    ),
    ("POST", "/v1/messages"): Operation(
        "Answer a conversation, in Anthropic's words", {200: MessagesResponse}, MessagesRequest,
        get_args(MessagesEvent), {"max_tokens": 64, "messages": _HELLO}, _MESSAGE_EVENTS,
        MessagesErrorResponse,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "The tokens of its prompt", {200: CountTokensResponse}, CountTokensRequest,
        example={"messages": _HELLO}, error=MessagesErrorResponse,
    ),
    ("POST", "/v1/embeddings"): Operation(
        "A vector for each text, by an embedding model", {200: EmbeddingResponse},
        EmbeddingRequest, example={"input": ["Hello", "world"]}, is_queued=True,
    ),
    ("POST", "/v1/rerank"): _ranking("Documents by how well they answer a query"),
    ("POST", "/v2/rerank"): _ranking("The same, where Cohere's clients ask for it"),
    ("POST", "/rerank"): _ranking("The same"),
    ("POST", "/v1/score"): _scoring("How well each document answers its query"),
    ("POST", "/score"): _scoring("The same"),
    ("POST", "/v1/responses/input_tokens"): Operation(
        "How many tokens the prompt of a response has", {200: InputTokens}, ResponsesRequest,
        example={"input": "Hello world"},
    ),
    ("GET", "/v1/responses/{response_id}"): Operation(
        "A stored response; with ?stream=true the events of one that is streamed in the "
        "background, behind ?starting_after=N", {200: Response},
    ),
    ("DELETE", "/v1/responses/{response_id}"): Operation("Forget it", {200: Deleted}),
    ("POST", "/v1/responses/{response_id}/cancel"): Operation(
        "Stop a response in the background", {200: Response}
    ),
    ("GET", "/v1/responses/{response_id}/input_items"): Operation(
        "What it was asked with: ?limit=20&order=desc&after=ID", {200: InputItems}
    ),
    ("POST", "/v1/files"): Operation(
        "Keep a file for a batch, as multipart/form-data with purpose and file", {200: FileObject},
        is_form=True,
    ),
    ("GET", "/v1/files"): Operation("The files: limit, after, order, purpose", {200: FileList}),
    ("GET", "/v1/files/{file_id}"): Operation("One of them", {200: FileObject}),
    ("DELETE", "/v1/files/{file_id}"): Operation("Forget it", {200: FileDeleted}),
    ("GET", "/v1/files/{file_id}/content"): Operation("What it holds", {200: None}),
    ("POST", "/v1/batches"): Operation(
        "Answer a file of requests, behind all others", {200: Batch}, BatchRequest,
        example={"input_file_id": "file-...", "endpoint": "/v1/chat/completions",
                 "completion_window": "24h"},
    ),
    ("GET", "/v1/batches"): Operation("The batches, by limit and after", {200: BatchList}),
    ("GET", "/v1/batches/{batch_id}"): Operation("What has become of it", {200: Batch}),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation("End it", {200: Batch}),
    ("GET", "/v1/models"): Operation("The names the model is served by", {200: ModelList}),
    ("GET", "/v1/models/{model}"): Operation("One of them", {200: Model}),
    ("POST", "/v1/load_lora_adapter"): Operation(
        "Serve the LoRA adapter of a folder under a name", {200: None}, LoadAdapterRequest,
        example={"lora_name": "sql", "lora_path": "/adapters/sql"},
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "Serve it no more", {200: None}, UnloadAdapterRequest, example={"lora_name": "sql"},
    ),
    ("POST", "/tokenize"): Operation(
        "Token ids of a text, or of the prompt made from messages", {200: TokenizeResponse},
        TokenizeRequest, example={"prompt": "Hello world"},
    ),
    ("POST", "/detokenize"): Operation(
        "The text of token ids", {200: DetokenizeResponse}, DetokenizeRequest,
        example={"tokens": [100, 101, 102]},
    ),
    ("GET", "/health"): _HEALTH,
    ("GET", "/health/ready"): _HEALTH,
    ("GET", "/health/live"): Operation("200 while the event loop runs", {200: Live}),
    ("GET", "/ping"): _HEALTH,
    ("POST", "/ping"): _HEALTH,
    ("GET", "/load"): Operation("Requests in flight", {200: Load}),
    ("POST", "/reset_prefix_cache"): Operation(
        "Forget the prompts so far, so that the next ones are computed", {200: Done}
    ),
    ("POST", "/abort_requests"): Operation(
        "End requests by the ids of their answers, or all of them: they end in an error",
        {200: Aborted}, AbortRequest, example={"request_ids": ["chatcmpl-..."]},
    ),
    ("POST", "/sleep"): Operation(
        "Free the KV cache (?level=1) or the weights as well (?level=2); requests wait meanwhile, "
        "or end first (?mode=abort)",
        {200: Sleeping},
    ),
    ("POST", "/wake_up"): Operation("Go on", {200: Awake}),
    ("GET", "/is_sleeping"): Operation("Whether it sleeps", {200: IsSleeping}),
    ("GET", "/version"): Operation("The version of pyserve", {200: Version}),
    ("GET", "/metrics"): Operation("Metrics in Prometheus's text format", {200: None}),
}  # fmt: skip

_WITHOUT_EFFECT = "Accepted without effect; named in the header x-pyserve-ignored."
_ERRORS = {
    400: "A value is missing, of a wrong type, out of range or not built yet",
    401: "The API key is missing or wrong",
    404: "No such model",
    413: "The body is too large",
    429: "As many requests wait as may",
    500: "The request failed here",
    503: "Starting, shutting down, or out of time",
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
        if names := re.findall(r"{(\w+)}", path):
            errors.add(404)
            described["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in names
            ]
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


def _reply(operation: Operation, wire_type: type[msgspec.Struct] | None) -> Schema:
    headers = {"X-Request-Id": _header("The one sent along, or one made here")}
    if wire_type is None:
        content: Schema = {"text/plain": {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": _reference(wire_type)}}
    described: Schema = {"description": "The answer", "headers": headers, "content": content}
    if operation.body is not None:
        headers["x-pyserve-ignored"] = _header("Fields of the request that had no effect")
        headers["x-pyserve-merged"] = _header(
            "What was done to messages for a chat template that does not take their order: system "
            "messages are text of users, turns are put together"
        )
    if operation.chunks:
        headers["x-pyserve-clamped"] = _header(
            "max_tokens=N: N is what the prompt leaves of the context, and less than was asked for"
        )
    if operation.chunks:
        words = operation.stream.format(
            chunks=" or ".join(chunk.__name__ for chunk in operation.chunks),
            error=operation.error.__name__,
        )
        described["description"] = (
            f"The answer; with `stream` {words} Lines that begin with a colon keep proxies awake."
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
