"""client.Constraint for grammars: which tokens one answer may produce next, thinking included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pyserve.text.grammar_matcher import Matcher, MatcherBatch
from pyserve.text.grammar_vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class FreeUntil:
    """A part of an answer before the grammar starts, in which any token is allowed: its thinking.

    ends       texts or special tokens that end this part. If the answer would end within it,
               although the grammar requires something to follow, the first of them is forced and
               the answer goes on.
    next_ends  also end it, but belong to the grammar's text.
    starts     not empty where this part is optional: the answer has it if it begins with one of
               these; otherwise the grammar applies from the first token. Empty: the answer is in
               this part already.
    """

    ends: tuple[str, ...]
    next_ends: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()


class GrammarFiller:
    """client.MaskFiller for answers whose next mask comes from their grammar alone."""

    def __init__(self) -> None:
        self._batch = MatcherBatch()

    def work(self, constraint: GrammarConstraint) -> tuple[object, float]:
        states = constraint._matcher.states
        return states, states.mask_s

    def fill(
        self,
        constraints: Sequence[GrammarConstraint],
        rows: Sequence[int],
        bitmask: NDArray[np.int32],
        *,
        is_alone: bool,
    ) -> None:
        matchers = [constraint._matcher for constraint in constraints]
        errors = self._batch.fill(matchers, rows, bitmask, is_alone=is_alone)
        for constraint, error in zip(constraints, errors, strict=True):
            if error:
                constraint._fail(f"no token can follow: {error}")


_FILLER = GrammarFiller()


class GrammarConstraint:
    """client.Constraint for a grammar, and for the free text that may come before it (FreeUntil).

    An answer with optional free text starts as `undecided`: the mask allows what the grammar allows
    and the first token of each opening. A token that begins an opening leads to `opening`, where
    only the rest of an opening is allowed. In free text, `free`, everything is allowed. That
    includes stop tokens, as a model that is done and could not stop would ramble on. If one comes
    before the grammar allows an end, the answer enters `closing`, where only the text that ends
    free text is allowed.
    """

    def __init__(
        self, vocabulary: Vocabulary, matcher: Matcher, free_until: FreeUntil | None
    ) -> None:
        self._table = vocabulary.table()
        self._vocabulary = vocabulary
        self._pieces = vocabulary.pieces
        self._matcher = matcher
        self._error: str | None = None
        self._free: list[int] = []  # tokens of the opening and the free text
        self._used: list[int] = []  # per token: how many tokens it gave the matcher; -1: free text
        self._ends = tuple(end.encode() for end in free_until.ends) if free_until else ()
        self._next_ends = tuple(end.encode() for end in free_until.next_ends) if free_until else ()
        self._max_end = max(map(len, (*self._ends, *self._next_ends)), default=0)
        self._starts = vocabulary.encode_all(free_until.starts) if free_until else []
        self._closing_ids = self._ids_of_end(free_until)
        # len(_free) just after a stop token that did not end the answer; None if there was none.
        self._closing_at: int | None = None
        self._first: Literal["undecided", "free", "grammar"] = (
            "undecided" if self._starts else "free" if free_until else "grammar"
        )
        self._phase: Literal["undecided", "opening", "free", "closing", "grammar"] = self._first

    @property
    def is_free(self) -> bool:
        return self._phase == "free"

    @property
    def is_finished(self) -> bool:
        return self._phase == "grammar" and self._error is None and self._matcher.is_stopped

    @property
    def is_end_void(self) -> bool:
        return self._phase == "closing" and self._closing_at == len(self._free)

    @property
    def error(self) -> str | None:
        return self._error

    @property
    def filler(self) -> GrammarFiller | None:
        return _FILLER if self._phase == "grammar" and self._error is None else None

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        """As client.Constraint.fill_bitmask. Releases the interpreter's lock."""
        if self._phase == "free" or self._error is not None:
            words.fill(-1)
            return
        if self._phase in ("opening", "closing"):
            words.fill(0)
        else:
            self._check("no token can follow", self._matcher.fill_bitmask(words))
        if self._phase == "closing":
            token_id = self._closing_ids[self._num_closing_ids]
            words.view("uint32")[token_id >> 5] = 1 << (token_id & 31)
        elif self._phase != "grammar":
            at = len(self._free)
            for start in self._starts:
                if start[:at] == self._free:
                    bits = words.view("uint32")
                    bits[start[at] >> 5] |= 1 << (start[at] & 31)

    def accept(self, token_ids: Sequence[int]) -> None:
        """As client.Constraint.accept."""
        for token_id in token_ids:
            if not 0 <= token_id < self._vocabulary.vocab_size:
                self._fail(f"{token_id} is not a token")
                self._used.append(0)
            elif self._phase == "undecided":
                self._decide(token_id)
            elif self._phase == "grammar":
                self._used.append(self._consume([token_id]))
            else:
                self._used.append(-1)
                self._free.append(token_id)
                if self._phase == "opening":
                    self._look_for_start()
                else:
                    self._look_for_void_end(token_id)
                    self._look_for_end()

    def rollback(self, num_tokens: int) -> None:
        """As client.Constraint.rollback. An error stays."""
        num_used = 0
        for _ in range(min(num_tokens, len(self._used))):
            used = self._used.pop()
            if used >= 0:
                num_used += used
                continue
            self._free.pop()
            if self._phase == "grammar":  # the token that ended the free text is taken back
                num_used = 0
                self._matcher.reset()
            if self._closing_at is not None and self._closing_at > len(self._free):
                self._closing_at = None
            if self._closing_at is not None:
                self._phase = "closing"
                continue
            self._phase = "free"
            if len(self._free) < max(map(len, self._starts), default=0):
                self._look_for_start()
        if not self._used:
            self._phase = self._first
        if num_used and self._error is None:
            self._check("tokens cannot be taken back", self._matcher.rollback(num_used))

    def _decide(self, token_id: int) -> None:
        """Read the first token: it belongs to the grammar if that allows it, else to an opening."""
        if self._matcher.allows(token_id):
            self._phase = "grammar"
            self._used.append(self._consume([token_id]))
            return
        self._used.append(-1)
        self._free.append(token_id)
        self._look_for_start()

    def _look_for_start(self) -> None:
        """Choose the phase: the tokens so far are a whole opening, the beginning of one, or an
        error.
        """
        parts = [start[: len(self._free)] for start in self._starts]
        if any(self._free[: len(start)] == start for start in self._starts):
            self._phase = "free"
        elif self._free in parts:
            self._phase = "opening"
        else:
            self._fail("the grammar does not allow the token that has come")

    @property
    def _num_closing_ids(self) -> int:
        """How many tokens of the forced closing text have come."""
        return len(self._free) - (self._closing_at or 0)

    def _ids_of_end(self, free_until: FreeUntil | None) -> list[int]:
        """Token ids of the text that can be forced to end free text; [] if there is none."""
        if free_until is None or not free_until.ends:
            return []
        token_ids = self._vocabulary.tokenizer.encode_inner(free_until.ends[0])
        text = b"".join([self._pieces[token_id] for token_id in token_ids])
        is_known = max(token_ids, default=0) < self._vocabulary.vocab_size
        return token_ids if is_known and text.endswith(free_until.ends[0].encode()) else []

    def _look_for_void_end(self, token_id: int) -> None:
        """Enter `closing` if a stop token came within free text and the grammar allows
        no end yet.
        """
        is_end = token_id in self._vocabulary.eos_token_ids
        if not is_end or self._phase != "free" or not self._closing_ids:
            return
        if not self._matcher.allows(token_id):
            self._phase, self._closing_at = "closing", len(self._free)

    def _look_for_end(self) -> None:
        """After a token of free text: if an end is complete, switch to the grammar and give it
        whatever the token holds beyond that end.
        """
        recent = self._free[-self._max_end :]
        pieces = [self._pieces[token_id] for token_id in recent]
        tail = b"".join(pieces)
        for end in (*self._ends, *self._next_ends):
            at = tail.find(end, max(0, len(tail) - len(pieces[-1]) - len(end) + 1))
            if at < 0:
                continue
            self._phase = "grammar"
            if end in self._ends:
                at += len(end)
                # White space before the answer is skipped: no grammar expects it.
                at += len(tail) - at - len(tail[at:].lstrip())
            if tail[at:]:
                self._consume(self._tokens_from(at, tail, recent))
            return

    def _tokens_from(self, at: int, tail: bytes, recent: list[int]) -> list[int]:
        """The tokens of `tail` from byte `at` on: the tokens that came, if one starts there."""
        start = 0
        for index, token_id in enumerate(recent):
            if start == at:
                return recent[index:]
            start += len(self._pieces[token_id])
        return self._table.tokenize_bytes(tail[at:])

    def _consume(self, token_ids: list[int]) -> int:
        """Give tokens to the matcher. Returns how many of them it has taken."""
        if self._error is not None:
            return 0
        # The grammar has ended: only a stop token may come, and it is dropped.
        if self._matcher.is_stopped:
            if not set(self._vocabulary.eos_token_ids).issuperset(token_ids):
                self._fail("a token has come behind the end of the grammar")
            return 0
        error = self._matcher.consume(token_ids)
        self._check("the grammar does not allow the token that has come", error)
        return 0 if error else len(token_ids)

    def _check(self, reason: str, error: str) -> None:
        if error:
            self._fail(f"{reason}: {error}")

    def _fail(self, reason: str) -> None:
        if self._error is None:
            self._error = reason
