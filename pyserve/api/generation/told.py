"""ToldTokens: which tokens the shown text is made of, for answers that show ids or logprobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from pyserve.client import TokenLogprobs


class Told(msgspec.Struct, frozen=True, gc=False):
    """A token that is shown: one of an answer, or of its echoed prompt.

    offset     where its text begins in the text of the answer, in characters.
    logprobs   its logprobs; None where none were requested, and for the first token of a prompt.
    is_prompt  it belongs to the echoed prompt.
    """

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None
    is_prompt: bool = False


class ToldTokens:
    """Holds the tokens of one answer until it is certain that their text is shown.

    A token is released with the first of its characters that is shown. A token that completes no
    character, such as the first bytes of one, is released with the text before it. So a token whose
    text a stop string has cut off entirely is never released.

    is_ended  the answer has ended and no more text is cut off: `settle` releases all that is held.
    """

    def __init__(self, offset: int) -> None:
        """`offset`: number of characters of the echoed prompt, which come before the answer."""
        self.is_ended = False
        self._num_chars = self._num_settled = offset
        self._logprobs: deque[TokenLogprobs] = deque()
        self._held: deque[tuple[Told, int]] = deque()  # each with the offset where its text ends

    @property
    def is_due(self) -> bool:
        """Whether the answer has ended and tokens are held that no further text will release."""
        return self.is_ended and bool(self._held)

    def expect(self, logprobs: list[TokenLogprobs] | None) -> None:
        """Take the logprobs of the tokens that are pushed next; None where none were requested."""
        self._logprobs.extend(logprobs or ())

    def push(self, token_id: int, num_chars: int) -> None:
        """Hold the next token, which completes `num_chars` characters of the answer's text."""
        logprobs = self._logprobs.popleft() if self._logprobs else None
        begin, self._num_chars = self._num_chars, self._num_chars + num_chars
        self._held.append((Told(token_id, begin, logprobs), self._num_chars))

    def end(self, token_ids: Sequence[int]) -> None:
        """End the answer; `token_ids` are its last tokens, whose text is not shown."""
        for token_id in token_ids:
            self.push(token_id, 0)
        self.is_ended = True

    def settle(self, num_chars: int) -> tuple[Told, ...]:
        """Release the tokens of the next `num_chars` characters, which are shown now."""
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
