"""How answers report logprobs and ids of their own tokens and of the prompt's."""

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

MIN_LOGPROB = -9999.0  # stands for -inf and all below, as JSON has no infinity


class TokenWords:
    """Builds the logprobs and token ids of one request's answers.

    num_top         number of most likely tokens reported beside each output token; None: the
                    answer has no logprobs.
    num_prompt_top  the same for prompt tokens, in prompt_logprobs.
    has_ids         token ids are reported.
    is_by_id        a token is written as "token_id:ID" instead of its text.
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
        """The ids of the output tokens among `tokens`; None if ids are not reported."""
        if not self.has_ids:
            return None
        return [token.token_id for token in tokens if not token.is_prompt]

    def chat(self, tokens: Sequence[Told]) -> ChatLogprobs | None:
        """The logprobs of some or all tokens of a chat's answer; None if they are not reported."""
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
        """As `chat`, for a text completion, in its format."""
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
        """The field prompt_logprobs; None if it was not requested.

        `logprobs` starts with the second token, as nothing precedes the first one to predict it.
        """
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
        """The token itself and the most likely tokens; of tokens with the same text the first."""
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
