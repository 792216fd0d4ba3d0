"""POST /v1/score and /v1/rerank: pairs of a query and a document -> how well they fit.

A score is in [0, 1], how likely "yes" is beside "no"; without the activation it is the difference
of the logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial

import msgspec
from aiohttp import web
from msgspec import UNSET

from pyserve.api.endpoints import prompts
from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.pooling import check_fits, pooling_job, read_truncation
from pyserve.api.generation.generate import Generation
from pyserve.api.state import STATE, Loaded
from pyserve.api.wire.pooling import (
    PoolingFields,
    Ranked,
    RerankRequest,
    RerankResponse,
    Score,
    ScoreRequest,
    ScoreResponse,
    TextDocument,
)
from pyserve.api.wire.protocol import MAX_SEQUENCES
from pyserve.errors import InvalidRequestError
from pyserve.params import shown
from pyserve.text.score_template import ScoreTemplate
from pyserve.text.tokenizer import Tokenizer

SCORE, RERANK = Wire(ScoreRequest), Wire(RerankRequest)
QUERIES = ("queries", "text_1", "data_1")  # the same field, by its names
DOCUMENTS = ("documents", "items", "text_2", "data_2")
MAX_PAIRS_CHARS = 2**24  # of all pairs: each may be tokenised a few times, 1 us a character
MAX_CUTS = 4  # of one document: a text that is cut may make a few tokens more than before

Pair = tuple[str, str]  # a query and a document


async def score(request: web.Request) -> web.StreamResponse:
    """A score for each pair."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request, work="score")
    body, ignored = await SCORE.read(request, state)
    state.check_model_name(body.model)
    query_name, queries = _one_of(body, QUERIES)
    name, documents = _one_of(body, DOCUMENTS)
    counts = {len(queries), len(documents)}
    if len(counts - {1}) > 1 or 0 in counts:
        raise InvalidRequestError(
            f"{query_name} and {name} must hold as many texts, or one of them a single one, got "
            f"{len(queries)} and {len(documents)}",
            name,
        )
    pairs = list(zip(*(_times(texts, max(counts)) for texts in (queries, documents)), strict=True))
    whole = partial(_encode_scores, body.use_activation is not False)
    return await _answer(
        request, loaded, body, pairs, name, Dialect("score-", whole), ignored=ignored,
        instruction=body.instruction, arrived_s=arrived_s,
    )  # fmt: skip


async def rerank(request: web.Request) -> web.StreamResponse:
    """The documents in the order in which they answer the query, the best first."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request, work="score")
    body, ignored = await RERANK.read(request, state)
    state.check_model_name(body.model)
    for name in ("top_n", "max_tokens_per_doc"):
        value = getattr(body, name)
        if value is not None and value < 0:
            raise InvalidRequestError(f"{name} must be at least 0, got {shown(value)}", name)
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    pairs = [(body.query, document) for document in documents]
    whole = partial(_encode_ranking, body, documents)
    return await _answer(
        request, loaded, body, pairs, "documents", Dialect("rerank-", whole), ignored=ignored,
        instruction=body.instruction, arrived_s=arrived_s, max_doc_tokens=body.max_tokens_per_doc,
    )  # fmt: skip


def _one_of(body: ScoreRequest, names: Sequence[str]) -> tuple[str, list[str]]:
    """The one of some names that is given, and its texts."""
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"exactly one of {', '.join(names)} must be given, got {', '.join(given) or 'none'}",
            (given or names)[0],
        )
    value: str | list[str] = getattr(body, given[0])
    return given[0], [value] if isinstance(value, str) else value


def _times(texts: list[str], count: int) -> list[str]:
    return texts * count if len(texts) == 1 else texts


async def _answer(
    request: web.Request, loaded: Loaded, body: PoolingFields, pairs: list[Pair], name: str,
    dialect: Dialect, *, ignored: list[str], instruction: str | None, arrived_s: float,
    max_doc_tokens: int | None = None,
) -> web.StreamResponse:  # fmt: skip
    """The answer about `pairs`, whose documents the field `name` holds."""
    state = request.app[STATE]
    if not 1 <= len(pairs) <= MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{name} must hold 1 to {MAX_SEQUENCES} documents, got {len(pairs)}", name
        )
    ignored = [*ignored]
    cut = read_truncation(body, loaded, ignored)
    template = loaded.score_template
    assert template is not None, "of a model that scores"
    max_model_len = loaded.engine.info.max_model_len
    size = 0
    for query, document in pairs:
        num_chars = len(query) + len(document) + len(instruction or "")
        prompts.check_size(num_chars, max_model_len=max_model_len, param=name)
        size += num_chars
    if size > MAX_PAIRS_CHARS:
        raise InvalidRequestError(
            f"{name} and what each is held against have {size} characters in all, the limit is "
            f"{MAX_PAIRS_CHARS}",
            name,
        )

    def read() -> list[list[int]]:
        encoded, num_tokens = [], 0
        for index, pair in enumerate(pairs):
            ids = _encode_pair(
                loaded.tokenizer, template, pair, instruction, cut=cut, max_tokens=max_doc_tokens
            )
            check_fits(ids, name, index, max_model_len)  # before the next one is read
            encoded.append(ids)
            num_tokens += len(ids)
            prompts.check_total(num_tokens, n=1, param=name)
        return encoded

    token_ids = await state.run_text(request, size, read)
    job = pooling_job(body, loaded, token_ids, name=name, ignored=ignored)
    return await answer(request, loaded.engine, job, dialect, arrived_s=arrived_s)


def _encode_pair(
    tokenizer: Tokenizer, template: ScoreTemplate, pair: Pair, instruction: str | None, *,
    cut: prompts.Truncation | None, max_tokens: int | None,
) -> list[int]:  # fmt: skip
    """Token ids of the prompt. What is cut is the document: the form around it stays.

    cut         to how many tokens the prompt, and which end of the document is kept.
    max_tokens  of the document at most; None and 0: any.
    """
    query, document = pair
    if max_tokens:
        keep = prompts.Truncation(max_tokens, is_start_kept=True)
        document = _shortened(tokenizer, document, keep)
    token_ids = template.encode(query, document, instruction)
    if cut is None:
        return token_ids
    for _ in range(MAX_CUTS):
        excess = len(token_ids) - cut.limit
        if excess <= 0:
            return token_ids
        num_tokens = len(tokenizer.encode(document, add_special_tokens=False))
        keep = prompts.Truncation(max(num_tokens - excess, 0), cut.is_start_kept)
        document = _shortened(tokenizer, document, keep)
        token_ids = template.encode(query, document, instruction)
    if len(token_ids) > cut.limit:
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {cut.limit}, and the prompt has {len(token_ids)} tokens "
            "when all that can be cut of its document is gone",
            "truncate_prompt_tokens",
        )
    return token_ids


def _shortened(tokenizer: Tokenizer, text: str, keep: prompts.Truncation) -> str:
    """The text of the tokens that are kept of `text`."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    kept = keep.cut(token_ids)
    if len(kept) == len(token_ids):
        return text
    return tokenizer.decode(kept, skip_special_tokens=False)


def _values(generation: Generation, *, is_activated: bool) -> list[float]:
    """The score of each pair."""
    values = []
    for choice in generation.choices:
        assert choice.stream.pooled is not None
        value = float(choice.stream.pooled[0])
        values.append(_sigmoid(value) if is_activated else value)
    return values


def _sigmoid(value: float) -> float:
    power = math.exp(-abs(value))  # never overflows
    return 1 / (1 + power) if value >= 0 else power / (1 + power)


def _encode_scores(is_activated: bool, head: Head, generation: Generation) -> bytes:
    values = _values(generation, is_activated=is_activated)
    return msgspec.json.encode(
        ScoreResponse(
            id=head.id,
            created=head.created,
            model=head.model,
            data=[Score(index=index, score=value) for index, value in enumerate(values)],
            usage=generation.usage(),
        )
    )


def _encode_ranking(
    body: RerankRequest, documents: list[str], head: Head, generation: Generation
) -> bytes:
    values = _values(generation, is_activated=body.use_activation is not False)
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    is_told = body.return_documents is not False
    return msgspec.json.encode(
        RerankResponse(
            id=head.id,
            model=head.model,
            usage=generation.usage(),
            results=[
                Ranked(
                    index=index,
                    document=TextDocument(documents[index]) if is_told else UNSET,
                    relevance_score=values[index],
                )
                for index in order[: body.top_n or len(order)]
            ],
        )
    )
