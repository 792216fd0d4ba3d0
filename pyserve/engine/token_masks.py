"""The constraints that come from sampling parameters: allowed_token_ids and bad_words.

Each implements client.Constraint, as a grammar does. A sequence with several must satisfy all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pyserve.client import Constraint
from pyserve.constraints import all_of
from pyserve.engine.masks import bitmask_words
from pyserve.errors import InvalidRequestError
from pyserve.params import SamplingParams


class AllowedTokens:
    """Allows only the given tokens. The sequence can end early only if they have a stop token."""

    is_free = is_finished = is_end_void = False
    error: str | None = None
    filler = None

    def __init__(self, token_ids: tuple[int, ...], vocab_size: int) -> None:
        """Raises InvalidRequestError if a token id is not in [0, vocab_size)."""
        self._words = _words_of(token_ids, vocab_size)

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        words[:] = self._words

    def accept(self, token_ids: Sequence[int]) -> None: ...

    def rollback(self, num_tokens: int) -> None: ...


@lru_cache(maxsize=2)  # all choices of a request share the mask; 100k ids take 10 ms
def _words_of(token_ids: tuple[int, ...], vocab_size: int) -> NDArray[np.int32]:
    """The mask, int32 [ceil(vocab_size / 32)], that allows only these tokens."""
    check_token_ids("allowed_token_ids", token_ids, vocab_size)
    is_allowed = np.zeros(32 * bitmask_words(vocab_size), np.bool_)
    is_allowed[np.fromiter(token_ids, np.int64, len(token_ids))] = True
    return np.packbits(is_allowed, bitorder="little").view(np.int32)


def check_token_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    """Raise InvalidRequestError if an id is not in [0, vocab_size); `name` is the ids' field."""
    if token_ids and not (0 <= min(token_ids) and max(token_ids) < vocab_size):
        wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            f"{name} holds token id {wrong}, the model's are in [0, {vocab_size})", name
        )


class BadWords:
    """Forbids the last token of each word where the word's other tokens precede it in the output.

    A word of one token is always forbidden. As in vLLM, only this tokenisation of a word is
    forbidden; other tokens that spell the same text are allowed.
    """

    is_finished = is_end_void = False
    error: str | None = None
    filler = None

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._output: list[int] = []
        self._never = [last for *beginning, last in words if not beginning]
        # second-to-last token -> (all tokens but the last, last token) of the words that have it
        self._after: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for *beginning, last in words:
            if beginning:
                self._after[beginning[-1]].append((beginning, last))

    @property
    def is_free(self) -> bool:
        return not self._never and not self._ends()

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        words.fill(-1)
        bits = words.view(np.uint32)
        for token_id in (*self._never, *self._ends()):
            bits[token_id // 32] &= ~np.uint32(1 << token_id % 32)

    def accept(self, token_ids: Sequence[int]) -> None:
        self._output += token_ids

    def rollback(self, num_tokens: int) -> None:
        del self._output[len(self._output) - num_tokens :]

    def _ends(self) -> list[int]:
        """The last tokens of those words whose other tokens the output ends with."""
        output = self._output
        if not output or output[-1] not in self._after:
            return []
        return [
            last
            for beginning, last in self._after[output[-1]]
            if output[-len(beginning) :] == beginning
        ]


def constraint_of(
    params: SamplingParams, beside: Constraint | None, vocab_size: int
) -> Constraint | None:
    """One constraint that combines those of `params` with `beside`; None where there are none.

    Raises InvalidRequestError for a token id that is not in [0, vocab_size).
    """
    parts: list[Constraint] = []
    if params.allowed_token_ids is not None:
        parts.append(AllowedTokens(params.allowed_token_ids, vocab_size))
    if params.bad_words:
        check_token_ids("bad_words", list(chain.from_iterable(params.bad_words)), vocab_size)
        parts.append(BadWords(params.bad_words))
    return all_of([*parts, beside])
