"""Tokens of an answer whose logprobs or ids are shown: which of them the shown text holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from pyserve.client import TokenLogprobs


class Told(msgspec.Struct, frozen=True, gc=False):
    """A token of an answer, or of its echoed prompt.

    offset    where its text begins in that of the answer, in characters.
    logprobs  None: they were not asked for, or nothing comes before the token.
    """

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None
    is_prompt: bool = False


class ToldTokens:
    """Holds the tokens of one answer until their text is settled.

    A token is given with the first text of it that is shown; one without a text of its own, such
    as the first part of a character, with what comes before it. So a token that a stop string has
    cut away whole is never given.

    is_ended  no token comes any more and none is cut away: all that are held are given next.
    """

    def __init__(self, offset: int) -> None:
        """`offset`: characters in front of the answer's own, those of an echoed prompt."""
        self.is_ended = False
        self._num_chars = self._num_settled = offset
        self._logprobs: deque[TokenLogprobs] = deque()
        self._held: deque[tuple[Told, int]] = deque()  # with the end of its text

    @property
    def is_due(self) -> bool:
        """Whether tokens are left that no text will bring along."""
        return self.is_ended and bool(self._held)

    def expect(self, logprobs: list[TokenLogprobs] | None) -> None:
        """Those of the next tokens to be pushed, where they were asked for."""
        self._logprobs.extend(logprobs or ())

    def push(self, token_id: int, num_chars: int) -> None:
        """The next token, which completes so many characters."""
        logprobs = self._logprobs.popleft() if self._logprobs else None
        begin, self._num_chars = self._num_chars, self._num_chars + num_chars
        self._held.append((Told(token_id, begin, logprobs), self._num_chars))

    def end(self, token_ids: Sequence[int]) -> None:
        """The answer has ended, with these tokens, of which no text is shown."""
        for token_id in token_ids:
            self.push(token_id, 0)
        self.is_ended = True

    def settle(self, num_chars: int) -> tuple[Told, ...]:
        """The tokens of the next `num_chars` characters, which are shown now."""
        self._num_settled += num_chars
        settled = []
        while self._held:
            token, end = self._held[0]
            is_shown = token.offset < self._num_settled or end <= self._num_settled
            if not (is_shown or self.is_ended):
                break
            settled.append(token)
            self._held.popleft()
        return tuple(settled)
