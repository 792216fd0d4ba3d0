"""Fields about the tokens of an answer and of its prompt: logprobs, and ids."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pyserve.api.endpoints.token_words import TokenWords
from pyserve.api.state import Loaded, ServerState
from pyserve.api.wire.protocol import ChatRequest, CompletionRequest, SamplingFields
from pyserve.errors import InvalidRequestError
from pyserve.params import SamplingParams, shown

MAX_PROMPT_LOGPROBS = 2**20  # of one request; each takes about 100 bytes, and as many in the answer


@dataclass(frozen=True, slots=True)
class AskedTokens:
    """What a request wants to know of tokens.

    num_logprobs, num_prompt_logprobs  as SamplingParams has them.
    words                              None: the answer tells of no tokens.
    prompt_name                        the field that asks for those of the prompt.
    """

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    words: TokenWords | None = None
    prompt_name: str = "prompt_logprobs"

    def apply(self, params: SamplingParams) -> SamplingParams:
        """`params` that ask for it, beside what they ask for already."""
        if self.num_logprobs is None and self.num_prompt_logprobs is None:
            return params
        asked = self.num_logprobs
        return msgspec.structs.replace(
            params,
            num_logprobs=params.num_logprobs if asked is None else asked,
            num_prompt_logprobs=self.num_prompt_logprobs,
        )

    def check_prompts(self, num_tokens: int, *, n: int) -> None:
        """Bound what is told of prompts of so many tokens in all: the server holds all of it."""
        if self.num_prompt_logprobs is None:
            return
        num_told = num_tokens * n * (self.num_prompt_logprobs + 1)
        if num_told > MAX_PROMPT_LOGPROBS:
            raise InvalidRequestError(
                f"{self.prompt_name}: {num_tokens} prompt tokens times n {n} times "
                f"{self.num_prompt_logprobs + 1} logprobs each are {num_told}, the limit is "
                f"{MAX_PROMPT_LOGPROBS}",
                self.prompt_name,
            )


NO_TOKENS = AskedTokens()


def read_chat_tokens(
    body: ChatRequest, state: ServerState, loaded: Loaded, ignored: list[str]
) -> AskedTokens:
    """Of a chat. What has no effect is added to `ignored`; raises InvalidRequestError."""
    limit = state.config.max_logprobs
    num_top = _checked("top_logprobs", body.top_logprobs, limit)
    if num_top and body.logprobs is None:
        raise InvalidRequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if num_top and not body.logprobs:
        ignored.append("top_logprobs")
    return _asked(body, state, loaded, ignored, num_top=(num_top or 0) if body.logprobs else None)


def read_completion_tokens(
    body: CompletionRequest, state: ServerState, loaded: Loaded, ignored: list[str]
) -> AskedTokens:
    """Of a text completion, likewise; its echo tells of the prompt's tokens too."""
    if body.logprobs is True:
        raise InvalidRequestError("logprobs must be a number of tokens, got true", "logprobs")
    asked = None if body.logprobs is False else body.logprobs
    num_top = _checked("logprobs", asked, state.config.max_logprobs)
    return _asked(body, state, loaded, ignored, num_top=num_top, has_echo=bool(body.echo))


def _asked(
    body: SamplingFields, state: ServerState, loaded: Loaded, ignored: list[str], *,
    num_top: int | None, has_echo: bool = False,
) -> AskedTokens:  # fmt: skip
    if loaded.engine.info.has_logits:
        _check_comparing(body)
    num_prompt_top = _checked("prompt_logprobs", body.prompt_logprobs, state.config.max_logprobs)
    if num_prompt_top is not None and body.stream:
        raise InvalidRequestError("prompt_logprobs needs stream: false", "prompt_logprobs")
    if body.return_tokens_as_token_ids and num_top is None:
        ignored.append("return_tokens_as_token_ids")
    has_ids = bool(body.return_token_ids)
    if num_top is None and num_prompt_top is None and not has_ids:
        return NO_TOKENS
    is_by_id = body.return_tokens_as_token_ids
    words = TokenWords(
        loaded.tokenizer.decoder,
        num_top=num_top,
        num_prompt_top=num_prompt_top,
        has_ids=has_ids,
        is_by_id=state.config.return_tokens_as_token_ids if is_by_id is None else is_by_id,
    )
    echoed = num_top if has_echo else None
    asked = [num for num in (num_prompt_top, echoed) if num is not None]
    prompt_name = "prompt_logprobs" if echoed is None else "logprobs"
    return AskedTokens(num_top, max(asked, default=None), words, prompt_name)


def _check_comparing(body: SamplingFields) -> None:
    """Refuse what compares answers by the logarithms of their probabilities: there are none."""
    asked = {
        "use_beam_search": bool(body.use_beam_search),
        "best_of": (body.best_of or 1) > (body.n or 1),
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise InvalidRequestError(
                f"{name} compares answers by log probabilities: the server would have to be "
                "started with --logprobs-mode raw_logprobs",
                name,
            )


def _checked(name: str, num: int | None, limit: int) -> int | None:
    if num is not None and not 0 <= num <= limit:
        raise InvalidRequestError(
            f"{name} must be in [0, {limit}] (--max-logprobs), got {shown(num)}", name
        )
    return num
