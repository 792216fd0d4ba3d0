"""Wire types of logprobs in answers, with OpenAI's and vLLM's names."""

from __future__ import annotations

import msgspec


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A likely token. `bytes` are its UTF-8 bytes, which may be only a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, gc=False):
    content: list[TokenLogprob]


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The logprobs of a completion, in lists with one entry for each token.

    The first token of an echoed prompt has null in `token_logprobs` and `top_logprobs`.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct, frozen=True, gc=False):
    logprob: float
    token_rank: int = msgspec.field(name="rank")
    decoded_token: str


# For each prompt token: token id as text -> its logprob. None for the first token.
PromptLogprobs = list[dict[str, PromptLogprob] | None]
