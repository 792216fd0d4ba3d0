"""Scores by an embedding model: the cosine of the angle between the vectors of two texts."""

from __future__ import annotations

from collections.abc import Sequence

from pyserve.api.endpoints import prompts
from pyserve.api.generation.generate import Generation
from pyserve.api.state import Loaded
from pyserve.api.wire.protocol import MAX_SEQUENCES
from pyserve.errors import InvalidRequestError

MIN_LENGTH = 1e-12  # a vector is divided by at least that, as torch's cosine_similarity does


class Similarity:
    """Of each query and its document. A text that occurs several times is embedded once.

    pairs         queries and documents, each by its place in `texts`.
    num_queries   that `texts` begins with; the rest are documents.
    names         the fields that hold the queries and the documents.
    """

    def __init__(
        self, loaded: Loaded, pairs: Sequence[tuple[str, str]], names: tuple[str, str], *,
        cut: prompts.Truncation | None, max_doc_tokens: int | None,
    ) -> None:  # fmt: skip
        # The same text as a query and as a document is two, as only one of them may be cut.
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
        if len(places) > MAX_SEQUENCES + 1:  # one query and as many documents as may be
            raise InvalidRequestError(
                f"{' and '.join(names)} hold {len(places)} different texts, the limit is "
                f"{MAX_SEQUENCES + 1}",
                names[1],
            )

    @property
    def num_chars(self) -> int:
        """Of all that is tokenised."""
        return sum(map(len, self._texts))

    def read(self) -> list[list[int]]:
        """Token ids of each text, on a thread. Raises InvalidRequestError."""
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
    """The one that keeps less."""
    if cut is None or other is None:
        return cut or other
    return min(cut, other, key=lambda one: one.limit)
