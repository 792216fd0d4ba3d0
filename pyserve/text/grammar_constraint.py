"""client.Constraint of a grammar: the state of one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher

from pyserve.text.grammar_vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_ERROR_CHARS = 300


class GrammarConstraint:
    """client.Constraint of a grammar."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: LLMatcher, free_until: str | Sequence[int] | None
    ) -> None:
        self._table = vocabulary.table
        self._pieces = vocabulary.pieces
        self._vocab_size = vocabulary.vocab_size
        self._eos_token_ids = frozenset(vocabulary.eos_token_ids)
        self._matcher = matcher
        self._error: str | None = None
        self._end = free_until.encode() if isinstance(free_until, str) else None
        self._end_ids = [] if free_until is None or self._end is not None else list(free_until)
        self._free: list[int] = []  # tokens before the end of the reasoning
        self._is_free = bool(self._end or self._end_ids)
        self._used: list[int] = []  # of each token: how many the matcher has had of it, -1: free

    @property
    def is_free(self) -> bool:
        return self._is_free

    @property
    def is_finished(self) -> bool:
        return not self._is_free and self._error is None and self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        return self._error

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        """As client.Constraint has it. Lets go of the interpreter's lock."""
        if self._is_free or self._error is not None:
            words.fill(-1)
            return
        address = words.__array_interface__["data"][0]
        self._matcher.unsafe_compute_mask_ptr(address, words.nbytes)
        self._check("no token can follow")

    def accept(self, token_ids: Sequence[int]) -> None:
        """As client.Constraint has it."""
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                self._fail(f"{token_id} is not a token")
                self._used.append(0)
            elif self._is_free:
                self._used.append(-1)
                self._free.append(token_id)
                self._look_for_end()
            else:
                self._used.append(self._consume([token_id]))

    def rollback(self, num_tokens: int) -> None:
        """As client.Constraint has it. What went wrong is not forgotten."""
        num_used = 0
        for _ in range(min(num_tokens, len(self._used))):
            used = self._used.pop()
            if used >= 0:
                num_used += used
                continue
            self._free.pop()
            if not self._is_free:  # this token ended the reasoning
                self._is_free = True
                num_used = 0
                self._matcher.reset()
        if num_used and self._error is None and not self._matcher.rollback(num_used):
            self._check("tokens cannot be taken back")

    def _consume(self, token_ids: list[int]) -> int:
        """How many of them the matcher has taken."""
        if self._error is not None:
            return 0
        if self._matcher.is_stopped():  # the end has come; whatever follows it is dropped
            if not self._eos_token_ids.issuperset(token_ids):
                self._fail("a token has come behind the end of the grammar")
            return 0
        if not self._matcher.consume_tokens(token_ids):
            self._check("the grammar does not allow the token that has come")
            return 0
        return len(token_ids)

    def _look_for_end(self) -> None:
        """After a token of the reasoning: has it ended, and what of the token is beyond the end?"""
        if self._end_ids:
            self._is_free = self._free[-len(self._end_ids) :] != self._end_ids
            return
        assert self._end is not None
        recent = [self._pieces[token_id] for token_id in self._free[-len(self._end) - 1 :]]
        tail, last = b"".join(recent), recent[-1]
        at = tail.find(self._end, max(0, len(tail) - len(last) - len(self._end) + 1))
        if at < 0:
            return
        self._is_free = False
        rest = tail[at + len(self._end) :].lstrip()
        if rest:
            self._consume(self._table.tokenize_bytes(rest))

    def _check(self, reason: str) -> None:
        if self._matcher.is_error():
            self._fail(f"{reason}: {shortened(self._matcher.get_error())}")

    def _fail(self, reason: str) -> None:
        if self._error is None:
            self._error = f"the structured output cannot go on: {reason}"


def shortened(error: str) -> str:
    """The first line of what the engine says, without its own notes."""
    lines = [line.strip() for line in error.splitlines() if not line.startswith("<")]
    return " ".join(filter(None, lines))[:MAX_ERROR_CHARS]
