"""Constraints whose rules are functions of the output tokens, and which check how they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pyserve.client import MaskFiller

Rule = Callable[[Sequence[int]], Collection[int] | None]  # the output so far -> tokens; None: all


class Scripted:
    """Implements client.Constraint by a rule. Asserts that its calls never overlap.

    history      the tokens that it has accepted.
    num_masks    times that a mask was asked for.
    end          output tokens after which nothing but the end may follow.
    broken_at    output tokens with which it reports an error.
    on_fill      called by fill_bitmask.
    is_void      whether a stop token that is the n-th output token ends nothing.
    """

    filler: MaskFiller | None = None

    def __init__(
        self, rule: Rule, *, end: int | None = None, broken_at: int | None = None,
        on_fill: Callable[[], None] = lambda: None,
        is_void: Callable[[int], bool] = lambda num_tokens: False,
    ) -> None:  # fmt: skip
        self.rule = rule
        self.history: list[int] = []
        self.num_masks = 0
        self.on_fill = on_fill
        self.is_void = is_void
        self._end = end
        self._broken_at = broken_at
        self._lock = threading.Lock()

    @property
    def is_free(self) -> bool:
        with self._alone():
            return self.rule(self.history) is None

    @property
    def is_finished(self) -> bool:
        with self._alone():
            return self._end is not None and len(self.history) >= self._end

    @property
    def is_end_void(self) -> bool:
        with self._alone():
            return self.is_void(len(self.history))

    @property
    def error(self) -> str | None:
        with self._alone():
            return "as scripted" if len(self.history) == self._broken_at else None

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        with self._alone():
            self.num_masks += 1
            self.on_fill()
            allowed = self.rule(self.history)
            assert allowed is not None, "a mask of what is free"
            words.fill(0)
            bits = words.view(np.uint32)
            for token_id in allowed:
                bits[token_id // 32] |= np.uint32(1 << token_id % 32)

    def accept(self, token_ids: Sequence[int]) -> None:
        with self._alone():
            for token_id in token_ids:
                allowed = self.rule(self.history)
                assert allowed is None or token_id in allowed, f"{token_id} after {self.history}"
                self.history.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        with self._alone():
            del self.history[len(self.history) - num_tokens :]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert self._lock.acquire(blocking=False), "two threads at a time"
        try:
            yield
        finally:
            self._lock.release()


def always(*token_ids: int) -> Rule:
    return lambda output: token_ids


def windows(vocab_size: int, size: int) -> Rule:
    """A few tokens that depend on all before them; every fifth token is free."""

    def rule(history: Sequence[int]) -> Collection[int] | None:
        if len(history) % 5 == 4:
            return None
        first = sum((i + 1) * token_id for i, token_id in enumerate(history)) * 7 % vocab_size
        return {(first + i) % vocab_size for i in range(size)}

    return rule
