"""The request fields that ask for logprobs and ids of the answer's and the prompt's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pyserve.api.endpoints.token_words import TokenWords
from pyserve.api.state import Loaded, ServerState
from pyserve.api.wire.protocol import ChatRequest, CompletionRequest, SamplingFields
from pyserve.errors import InvalidRequestError
from pyserve.params import SamplingParams, shown

# Limit of one request. Each entry takes about 100 bytes in memory, and as many in the answer.
MAX_PROMPT_LOGPROBS = 2**20


@dataclass(frozen=True, slots=True)
class AskedTokens:
    """What a request asks to report about tokens.

    num_logprobs, num_prompt_logprobs
                 see SamplingParams.
    words        how the answer reports tokens; None: it reports none.
    prompt_name  the field that asks for the prompt's logprobs, which errors name.
    """

    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    words: TokenWords | None = None
    prompt_name: str = "prompt_logprobs"

    def apply(self, params: SamplingParams) -> SamplingParams:
        """`params` with these numbers of logprobs added."""
        if self.num_logprobs is None and self.num_prompt_logprobs is None:
            return params
        asked = self.num_logprobs
        return msgspec.structs.replace(
            params,
            num_logprobs=params.num_logprobs if asked is None else asked,
            num_prompt_logprobs=self.num_prompt_logprobs,
        )

    def check_prompts(self, num_tokens: int, *, n: int) -> None:
        """Refuse too many prompt logprobs, as the server holds all of them in memory.

        num_tokens  of all prompts together; each prompt has n choices.

        Raises InvalidRequestError.
        """
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
    """Read the fields of a chat; names of those without effect are added to `ignored`.

    Raises InvalidRequestError.
    """
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
    """As `read_chat_tokens`, for a text completion, whose echo includes the prompt's logprobs."""
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
    """Refuse fields that rank answers by log probability, as the server reports logits instead."""
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
