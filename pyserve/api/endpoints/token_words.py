"""How answers tell of their tokens, and of those of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from pyserve.api.generation.told import Told
from pyserve.api.wire.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from pyserve.client import TokenLogprobs
from pyserve.text.decoding import TokenDecoder

MIN_LOGPROB = -9999.0  # JSON has no -inf


class TokenWords:
    """How an answer tells of its tokens.

    num_top     most likely tokens shown beside each; None: no logprobs are shown.
    num_prompt_top
                the same of the prompt, in prompt_logprobs.
    has_ids     token ids are shown.
    is_by_id    a token is written as its id, not as its text.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        *,
        num_top: int | None = None,
        num_prompt_top: int | None = None,
        has_ids: bool = False,
        is_by_id: bool = False,
    ) -> None:
        self.num_top = num_top
        self.num_prompt_top = num_prompt_top
        self.has_ids = has_ids
        self._is_by_id = is_by_id
        self._pieces = decoder.pieces(skip_special_tokens=False)

    def ids(self, tokens: Sequence[Told]) -> list[int] | None:
        """Ids of output tokens; None where they are not shown."""
        if not self.has_ids:
            return None
        return [token.token_id for token in tokens if not token.is_prompt]

    def chat(self, tokens: Sequence[Told]) -> ChatLogprobs | None:
        """Of a part of a chat's answer, or of all of it; None where no logprobs are shown."""
        num_top = self.num_top
        if num_top is None:
            return None
        content = []
        for token in tokens:
            if token.logprobs is None:
                continue
            logprob, _, ids, logprobs = token.logprobs
            top = [
                TopLogprob(token=self._word(i), logprob=_finite(x), bytes=list(self._pieces[i]))
                for i, x in zip(ids[:num_top], logprobs, strict=False)
                if i >= 0
            ]
            content.append(
                TokenLogprob(
                    token=self._word(token.token_id),
                    logprob=_finite(logprob),
                    bytes=list(self._pieces[token.token_id]),
                    top_logprobs=top,
                )
            )
        return ChatLogprobs(content)

    def completion(self, tokens: Sequence[Told]) -> CompletionLogprobs | None:
        """As `chat`, of a text completion."""
        if self.num_top is None:
            return None
        return CompletionLogprobs(
            text_offset=[token.offset for token in tokens],
            token_logprobs=[
                None if token.logprobs is None else _finite(token.logprobs.logprob)
                for token in tokens
            ],
            tokens=[self._word(token.token_id) for token in tokens],
            top_logprobs=[self._top_words(token) for token in tokens],
        )

    def prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> PromptLogprobs | None:
        """prompt_logprobs; None where they were not asked for. `logprobs` of all but the first."""
        num_top = self.num_prompt_top
        if num_top is None:
            return None
        told: PromptLogprobs = [None]
        for token_id, entry in zip(token_ids[1:], logprobs, strict=True):
            found = {str(token_id): self._prompt_logprob(token_id, entry.logprob, entry.token_rank)}
            for place, (i, x) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1):
                if place <= num_top and i >= 0:
                    found.setdefault(str(i), self._prompt_logprob(i, x, place))
            told.append(found)
        return told

    def _prompt_logprob(self, token_id: int, logprob: float, token_rank: int) -> PromptLogprob:
        return PromptLogprob(_finite(logprob), token_rank, self._text(token_id))

    def _top_words(self, token: Told) -> dict[str, float] | None:
        """The token itself and the most likely ones. Some of these may have the same text."""
        if token.logprobs is None:
            return None
        logprob, _, ids, logprobs = token.logprobs
        words = {self._word(token.token_id): _finite(logprob)}
        for i, x in zip(ids[: self.num_top], logprobs, strict=False):
            if i >= 0:
                words.setdefault(self._word(i), _finite(x))
        return words

    def _word(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._is_by_id else self._text(token_id)

    def _text(self, token_id: int) -> str:
        return self._pieces[token_id].decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
