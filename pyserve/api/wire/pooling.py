"""Wire types of embeddings, scores and reranking, with OpenAI's, vLLM's and Cohere's names."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from pyserve.api.wire.protocol import Message, Usage

ENCODINGS = ("float", "base64")


class PoolingFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The common fields of all requests that generate nothing: embeddings, scores and reranking."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    use_activation: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    user: str | None = None


class EmbeddingRequest(PoolingFields, frozen=True, kw_only=True):
    input: str | list[str | int | list[int]] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None

    messages: list[Message] | None = None
    normalize: bool | None = None
    embed_dtype: str | None = None
    endianness: str | None = None


class ScoreRequest(PoolingFields, frozen=True, kw_only=True):
    """Pairs of a query and a document to score.

    Give the queries in exactly one of `queries`, `text_1` and `data_1`, and the documents in
    exactly one of `documents`, `items`, `text_2` and `data_2`. A single query is paired with every
    document, and a single document with every query; otherwise both lists have the same length.
    """

    queries: str | list[str] | None = None
    text_1: str | list[str] | None = None
    data_1: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    text_2: str | list[str] | None = None
    data_2: str | list[str] | None = None
    instruction: str | None = None


class TextDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


class RerankRequest(PoolingFields, frozen=True, kw_only=True):
    query: str
    documents: list[str | TextDocument]
    top_n: int | None = None
    instruction: str | None = None
    max_tokens_per_doc: int | None = None
    return_documents: bool | None = None


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    object: str = "embedding"
    embedding: list[float] | str


class EmbeddingResponse(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


class Score(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    object: str = "score"
    score: float


class ScoreResponse(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    document: TextDocument | UnsetType = UNSET
    relevance_score: float


class RerankResponse(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str
    usage: Usage
    results: list[Ranked]
