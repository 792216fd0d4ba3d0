"""Scores of an embedding model: the cosine similarity of the vectors of two texts."""

from __future__ import annotations

from collections.abc import Sequence

from pyserve.api.endpoints import prompts
from pyserve.api.endpoints.pooling import MIN_LENGTH
from pyserve.api.generation.generate import Generation
from pyserve.api.state import Loaded
from pyserve.api.wire.protocol import MAX_SEQUENCES
from pyserve.errors import InvalidRequestError


class Similarity:
    """Implements scores.Scorer for an embedding model. Equal texts are embedded only once.

    names           the fields with the queries and with the documents, which errors name.
    max_doc_tokens  limit for each document; None and 0: no limit.

    `_texts` holds the distinct queries, `_num_queries` of them, followed by the distinct documents.
    `_pairs` holds the indices of each query and its document in `_texts`.
    """

    def __init__(
        self, loaded: Loaded, pairs: Sequence[tuple[str, str]], names: tuple[str, str], *,
        cut: prompts.Truncation | None, max_doc_tokens: int | None,
    ) -> None:  # fmt: skip
        # The same text counts as two if it is both a query and a document, since max_doc_tokens
        # cuts only documents.
        places: dict[tuple[bool, str], int] = {}
        for query, _ in pairs:
            places.setdefault((False, query), len(places))
        self._num_queries = len(places)
        for _, document in pairs:
            places.setdefault((True, document), len(places))
        self._texts = [text for _, text in places]
        self._pairs = [(places[False, query], places[True, one]) for query, one in pairs]
        self._loaded = loaded
        self._names = names
        self._cut = cut
        self._max_doc_tokens = max_doc_tokens
        if len(places) > MAX_SEQUENCES + 1:  # one query for the largest number of documents
            raise InvalidRequestError(
                f"{' and '.join(names)} hold {len(places)} different texts, the limit is "
                f"{MAX_SEQUENCES + 1}",
                names[1],
            )

    @property
    def num_chars(self) -> int:
        """Number of characters in all texts that `read` tokenises."""
        return sum(map(len, self._texts))

    def read(self) -> list[list[int]]:
        """The token ids of each text; may run on a worker thread. Raises InvalidRequestError."""
        sides = self._texts[: self._num_queries], self._texts[self._num_queries :]
        encoded: list[list[int]] = []
        for name, texts, max_tokens in zip(
            self._names, sides, (None, self._max_doc_tokens), strict=True
        ):
            keep = prompts.Truncation(max_tokens, is_start_kept=True) if max_tokens else None
            encoded += prompts.read_token_ids(
                self._loaded, list(texts), name=name, add_special_tokens=True,
                cut=_shorter(self._cut, keep),
            )  # fmt: skip
            prompts.check_total(sum(map(len, encoded)), n=1, param=name)
        return encoded

    def values(self, generation: Generation) -> list[float]:
        """The score of each pair, in [-1, 1]."""
        vectors = []
        for choice in generation.choices:
            assert choice.stream.pooled is not None
            vector = choice.stream.pooled.astype("f8")
            vectors.append(vector / max(float(vector @ vector) ** 0.5, MIN_LENGTH))
        return [float(vectors[query] @ vectors[document]) for query, document in self._pairs]


def _shorter(
    cut: prompts.Truncation | None, other: prompts.Truncation | None
) -> prompts.Truncation | None:
    """The truncation that keeps fewer tokens; None if there is none."""
    if cut is None or other is None:
        return cut or other
    return min(cut, other, key=lambda one: one.limit)
