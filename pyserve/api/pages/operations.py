"""The table behind /openapi.json: what each route does, takes and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

import msgspec

from pyserve.api.endpoints.models import Model, ModelList
from pyserve.api.wire.adapters import LoadAdapterRequest, UnloadAdapterRequest
from pyserve.api.wire.batches import (
    Batch,
    BatchList,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
)
from pyserve.api.wire.messages import (
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
)
from pyserve.api.wire.protocol import (
    AbortRequest,
    ChatChunk,
    ChatRequest,
    ChatResponse,
    CompletionChunk,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from pyserve.api.wire.queries import (
    FileListQuery,
    InputItemsQuery,
    ListQuery,
    ResponseQuery,
    SleepQuery,
    WakeUpQuery,
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

# What follows "With `stream: true` the answer is sent as server-sent events."
_CHUNKS = (
    "Each is a line `data: ` with JSON of the schema {chunks}, and the last one is `data: [DONE]`. "
    "If the request fails after the stream has begun, one event has the schema {error}."
)
_EVENTS = (
    "Each has a line `event: ` with its type and a line `data: ` with JSON of the schema {chunks}; "
    "the last one holds the whole response. If the request fails after the stream has begun, the "
    "last two are response.failed and error."
)
_MESSAGE_EVENTS = (
    "Each has a line `event: ` with its type and a line `data: ` with JSON of the schema {chunks}. "
    "If the request fails after the stream has begun, the last one is `error`, with the schema "
    "{error}. A ping is sent from time to time while there is nothing else to send."
)


class Operation(NamedTuple):
    """What the document says about a route.

    replies    HTTP status -> wire type of the reply, without errors; None is plain text.
    chunks     the wire types of the events of a streamed answer.
    stream     describes these events.
    error      the wire type of an error.
    is_form    the body is a multipart form with a file.
    is_queued  the request waits for the model, as any with `chunks` does.
    query      the wire type of the query parameters.
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
    query: type[msgspec.Struct] | None = None


def _ranking(summary: str) -> Operation:
    documents = ["Paris is the capital of France.", "The sky is blue."]
    example = {"query": "What is the capital of France?", "documents": documents}
    return Operation(summary, {200: RerankResponse}, RerankRequest, example=example, is_queued=True)


def _scoring(summary: str) -> Operation:
    example = {"queries": "What is the capital of France?", "documents": ["Paris", "A cat"]}
    return Operation(summary, {200: ScoreResponse}, ScoreRequest, example=example, is_queued=True)


_HEALTH = Operation(
    "Answer 200 if the server would accept a request now", {200: Ready, 503: NotReady}
)
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
        "Answer a conversation (OpenAI's Responses API)", {200: Response}, ResponsesRequest,
        (Event,), {"input": "What is the capital of France?", "max_output_tokens": 64}, _EVENTS,
    ),
    ("POST", "/v1/messages"): Operation(
        "Answer a conversation (Anthropic's Messages API)", {200: MessagesResponse},
        MessagesRequest,
        get_args(MessagesEvent), {"max_tokens": 64, "messages": _HELLO}, _MESSAGE_EVENTS,
        MessagesErrorResponse,
    ),
    ("POST", "/v1/messages/count_tokens"): Operation(
        "Count the prompt tokens of a request to /v1/messages, without answering it",
        {200: CountTokensResponse}, CountTokensRequest,
        example={"messages": _HELLO}, error=MessagesErrorResponse,
    ),
    ("POST", "/v1/embeddings"): Operation(
        "Compute a vector for each text, with an embedding model", {200: EmbeddingResponse},
        EmbeddingRequest, example={"input": ["Hello", "world"]}, is_queued=True,
    ),
    ("POST", "/v1/rerank"): _ranking("Sort documents by how well they answer a query"),
    ("POST", "/v2/rerank"): _ranking("The same as /v1/rerank, at the path of Cohere's clients"),
    ("POST", "/rerank"): _ranking("The same as /v1/rerank"),
    ("POST", "/v1/score"): _scoring("Score how well each document answers its query"),
    ("POST", "/score"): _scoring("The same as /v1/score"),
    ("POST", "/v1/responses/input_tokens"): Operation(
        "Count the prompt tokens of a request to /v1/responses, without answering it",
        {200: InputTokens}, ResponsesRequest,
        example={"input": "Hello world"},
    ),
    ("GET", "/v1/responses/{response_id}"): Operation(
        "Get a stored response, or the events of one that was streamed in the background",
        {200: Response}, query=ResponseQuery,
    ),
    ("DELETE", "/v1/responses/{response_id}"): Operation(
        "Delete a stored response", {200: Deleted}
    ),
    ("POST", "/v1/responses/{response_id}/cancel"): Operation(
        "Cancel a response that is generated in the background", {200: Response}
    ),
    ("GET", "/v1/responses/{response_id}/input_items"): Operation(
        "List the input items of a stored response", {200: InputItems}, query=InputItemsQuery
    ),
    ("POST", "/v1/files"): Operation(
        "Upload a file of requests for a batch", {200: FileObject},
        is_form=True,
    ),
    ("GET", "/v1/files"): Operation("List files", {200: FileList}, query=FileListQuery),
    ("GET", "/v1/files/{file_id}"): Operation("Describe a file", {200: FileObject}),
    ("DELETE", "/v1/files/{file_id}"): Operation("Delete a file", {200: FileDeleted}),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        "Download the contents of a file", {200: None}
    ),
    ("POST", "/v1/batches"): Operation(
        "Start a batch: answer a file of requests in the background, after all other requests",
        {200: Batch}, BatchRequest,
        example={"input_file_id": "file-...", "endpoint": "/v1/chat/completions",
                 "completion_window": "24h"},
    ),
    ("GET", "/v1/batches"): Operation("List batches", {200: BatchList}, query=ListQuery),
    ("GET", "/v1/batches/{batch_id}"): Operation(
        "Describe a batch and how far it is", {200: Batch}
    ),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation("Cancel a batch", {200: Batch}),
    ("GET", "/v1/models"): Operation(
        "List the names of the served model and its adapters", {200: ModelList}
    ),
    ("GET", "/v1/models/{model}"): Operation("Describe one served name", {200: Model}),
    ("POST", "/v1/load_lora_adapter"): Operation(
        "Load a LoRA adapter and serve it under a name", {200: None}, LoadAdapterRequest,
        example={"lora_name": "sql", "lora_path": "/adapters/sql"},
    ),
    ("POST", "/v1/unload_lora_adapter"): Operation(
        "Stop serving a LoRA adapter", {200: None}, UnloadAdapterRequest,
        example={"lora_name": "sql"},
    ),
    ("POST", "/tokenize"): Operation(
        "Turn a text, or the prompt made from messages, into token ids", {200: TokenizeResponse},
        TokenizeRequest, example={"prompt": "Hello world"},
    ),
    ("POST", "/detokenize"): Operation(
        "Turn token ids into text", {200: DetokenizeResponse}, DetokenizeRequest,
        example={"tokens": [100, 101, 102]},
    ),
    ("GET", "/health"): _HEALTH,
    ("GET", "/health/ready"): _HEALTH,
    ("GET", "/health/live"): Operation(
        "Answer 200 as long as the server's event loop runs", {200: Live}
    ),
    ("GET", "/ping"): _HEALTH,
    ("POST", "/ping"): _HEALTH,
    ("GET", "/load"): Operation("Count the requests that are being answered", {200: Load}),
    ("POST", "/reset_prefix_cache"): Operation(
        "Empty the prefix cache: later prompts are computed anew", {200: Done}
    ),
    ("POST", "/abort_requests"): Operation(
        "Abort the requests with the given ids of answers, or all requests",
        {200: Aborted}, AbortRequest, example={"request_ids": ["chatcmpl-..."]},
    ),
    ("POST", "/sleep"): Operation(
        "Free the memory of the KV cache, and of the weights if asked, until /wake_up",
        {200: Sleeping}, query=SleepQuery,
    ),
    ("POST", "/wake_up"): Operation(
        "Allocate the memory again and go on after /sleep", {200: Awake}, query=WakeUpQuery,
    ),
    ("GET", "/is_sleeping"): Operation("Tell whether the server sleeps", {200: IsSleeping}),
    ("GET", "/version"): Operation("Tell the version of pyserve", {200: Version}),
    ("GET", "/metrics"): Operation("Get metrics in the text format of Prometheus", {200: None}),
}  # fmt: skip
