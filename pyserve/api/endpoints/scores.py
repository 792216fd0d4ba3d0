"""POST /v1/score and /v1/rerank: pairs of a query and a document -> relevance scores.

A reranker's score is the probability of "yes" against "no", in [0, 1]; with use_activation false it
is the difference of their logits. An embedding model's score is the cosine similarity of the two
texts (similarity.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec
from aiohttp import web
from msgspec import UNSET

from pyserve.api.endpoints import prompts
from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.pooling import check_fits, pooling_job, read_truncation
from pyserve.api.endpoints.similarity import Similarity
from pyserve.api.generation.generate import Generation
from pyserve.api.state import STATE, Loaded
from pyserve.api.wire.pooling import (
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
QUERIES = ("queries", "text_1", "data_1")  # the names under which clients may send the queries
DOCUMENTS = ("documents", "items", "text_2", "data_2")  # likewise
# Of all pairs together. Each may be tokenised several times, at 1 us per character.
MAX_PAIRS_CHARS = 2**24
# Attempts to cut one document to size. The remaining text, tokenised again, may make a few more
# tokens than were kept.
MAX_CUTS = 4

Pair = tuple[str, str]  # a query and a document


class Scorer(Protocol):
    """Turns pairs into prompts and the pooled results into scores, depending on the model."""

    @property
    def num_chars(self) -> int:
        """Number of characters in all texts that `read` tokenises."""

    def read(self) -> list[list[int]]:
        """The token ids of each prompt; may run on a worker thread. Raises InvalidRequestError."""

    def values(self, generation: Generation) -> list[float]:
        """The score of each pair, from the pooled outputs of the prompts."""


Encode = Callable[[Head, Generation, list[float]], bytes]  # makes the JSON answer from the scores


async def score(request: web.Request) -> web.StreamResponse:
    """Answer with a score for each pair."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request, "score", "embed")
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
    return await _answer(
        request, loaded, body, pairs, (query_name, name), "score-", _encode_scores,
        ignored=ignored, arrived_s=arrived_s,
    )  # fmt: skip


async def rerank(request: web.Request) -> web.StreamResponse:
    """Answer with the documents sorted by relevance to the query, the best first."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request, "score", "embed")
    body, ignored = await RERANK.read(request, state)
    state.check_model_name(body.model)
    for name in ("top_n", "max_tokens_per_doc"):
        value = getattr(body, name)
        if value is not None and value < 0:
            raise InvalidRequestError(f"{name} must be at least 0, got {shown(value)}", name)
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    pairs = [(body.query, document) for document in documents]
    return await _answer(
        request, loaded, body, pairs, ("query", "documents"), "rerank-",
        partial(_encode_ranking, body, documents), ignored=ignored, arrived_s=arrived_s,
        max_doc_tokens=body.max_tokens_per_doc,
    )  # fmt: skip


def _one_of(body: ScoreRequest, names: Sequence[str]) -> tuple[str, list[str]]:
    """The one field of `names` that is given, and its texts. Raises InvalidRequestError."""
    given = [name for name in names if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(
            f"exactly one of {', '.join(names)} must be given, got {', '.join(given) or 'none'}",
            (given or names)[0],
        )
    value: str | list[str] = getattr(body, given[0])
    return given[0], [value] if isinstance(value, str) else value


def _times(texts: list[str], count: int) -> list[str]:
    """A single text, repeated `count` times; several texts unchanged."""
    return texts * count if len(texts) == 1 else texts


async def _answer(
    request: web.Request, loaded: Loaded, body: ScoreRequest | RerankRequest, pairs: list[Pair],
    names: tuple[str, str], id_prefix: str, encode: Encode, *, ignored: list[str],
    arrived_s: float, max_doc_tokens: int | None = None,
) -> web.StreamResponse:  # fmt: skip
    """Score `pairs` and answer the request.

    names           the fields with the queries and with the documents, which errors name.
    max_doc_tokens  each document is first cut to so many tokens; None and 0: no limit.
    """
    state = request.app[STATE]
    name = names[1]
    if not 1 <= len(pairs) <= MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{name} must hold 1 to {MAX_SEQUENCES} documents, got {len(pairs)}", name
        )
    ignored = [*ignored]
    cut = read_truncation(body, loaded, ignored)
    pooling = loaded.engine.info.pooling
    assert pooling is not None
    scorer: Scorer
    if pooling.kind == "embed":
        without_effect = {
            "instruction": bool(body.instruction),
            "use_activation": body.use_activation is False,
        }
        ignored += [field for field, is_so in without_effect.items() if is_so]
        scorer = Similarity(loaded, pairs, names, cut=cut, max_doc_tokens=max_doc_tokens)
    else:
        scorer = _Judged(loaded, body, pairs, name, cut=cut, max_doc_tokens=max_doc_tokens)
    token_ids = await state.run_text(request, scorer.num_chars, scorer.read)
    job = pooling_job(body, loaded, token_ids, name=name, ignored=ignored)

    def whole(head: Head, generation: Generation) -> bytes:
        return encode(head, generation, scorer.values(generation))

    dialect = Dialect(id_prefix, whole)
    return await answer(request, loaded.engine, job, dialect, arrived_s=arrived_s)


class _Judged:
    """Implements Scorer for a reranker, which gets each pair as one prompt."""

    def __init__(
        self, loaded: Loaded, body: ScoreRequest | RerankRequest, pairs: list[Pair], name: str, *,
        cut: prompts.Truncation | None, max_doc_tokens: int | None,
    ) -> None:  # fmt: skip
        self.num_chars = 0
        self._loaded = loaded
        self._pairs = pairs
        self._instruction = body.instruction
        self._is_activated = body.use_activation is not False
        self._name = name
        self._cut = cut
        self._max_doc_tokens = max_doc_tokens
        self._max_model_len = loaded.engine.info.max_model_len
        for query, document in pairs:
            num_chars = len(query) + len(document) + len(self._instruction or "")
            prompts.check_size(num_chars, max_model_len=self._max_model_len, param=name)
            self.num_chars += num_chars
        if self.num_chars > MAX_PAIRS_CHARS:
            raise InvalidRequestError(
                f"{name} and what each is held against have {self.num_chars} characters in all, "
                f"the limit is {MAX_PAIRS_CHARS}",
                name,
            )

    def read(self) -> list[list[int]]:
        """The token ids of one prompt for each pair. Raises InvalidRequestError."""
        template = self._loaded.score_template
        assert template is not None, "of a model that scores"
        encoded, num_tokens = [], 0
        for index, pair in enumerate(self._pairs):
            ids = _encode_pair(
                self._loaded.tokenizer, template, pair, self._instruction, cut=self._cut,
                max_tokens=self._max_doc_tokens,
            )  # fmt: skip
            # Checked at once, so that no further pair is tokenised after one that is too long.
            check_fits(ids, self._name, index, self._max_model_len)
            encoded.append(ids)
            num_tokens += len(ids)
            prompts.check_total(num_tokens, n=1, param=self._name)
        return encoded

    def values(self, generation: Generation) -> list[float]:
        """The score of each pair: in [0, 1], or a difference of logits without activation."""
        values = []
        for choice in generation.choices:
            assert choice.stream.pooled is not None
            value = float(choice.stream.pooled[0])
            values.append(_sigmoid(value) if self._is_activated else value)
        return values


def _encode_pair(
    tokenizer: Tokenizer, template: ScoreTemplate, pair: Pair, instruction: str | None, *,
    cut: prompts.Truncation | None, max_tokens: int | None,
) -> list[int]:  # fmt: skip
    """The token ids of the prompt of one pair. Only the document is cut, never the template.

    cut         limit for the whole prompt, and which end of the document is kept.
    max_tokens  limit for the document alone; None and 0: no limit.

    Raises InvalidRequestError if the prompt is still too long after MAX_CUTS cuts.
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
        if excess <= 0 or not document:
            break
        num_tokens = len(tokenizer.encode(document, add_special_tokens=False))
        keep = prompts.Truncation(max(num_tokens - excess, 0), cut.is_start_kept)
        document = _shortened(tokenizer, document, keep)
        token_ids = template.encode(query, document, instruction)
    if len(token_ids) > cut.limit:
        num_tokens = len(tokenizer.encode(document, add_special_tokens=False))
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {cut.limit}, and the prompt still has {len(token_ids)} "
            f"tokens with its document cut to {num_tokens} tokens",
            "truncate_prompt_tokens",
        )
    return token_ids


def _shortened(tokenizer: Tokenizer, text: str, keep: prompts.Truncation) -> str:
    """`text`, cut to the tokens that `keep` leaves."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    kept = keep.cut(token_ids)
    if len(kept) == len(token_ids):
        return text
    return tokenizer.decode(kept, skip_special_tokens=False)


def _sigmoid(value: float) -> float:
    power = math.exp(-abs(value))  # cannot overflow, as the exponent is never positive
    return 1 / (1 + power) if value >= 0 else power / (1 + power)


def _encode_scores(head: Head, generation: Generation, values: list[float]) -> bytes:
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
    body: RerankRequest, documents: list[str], head: Head, generation: Generation,
    values: list[float],
) -> bytes:  # fmt: skip
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
