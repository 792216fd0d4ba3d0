"""POST /v1/completions: text or token-id prompts -> Job; parts of the answer -> text_completion."""

from __future__ import annotations

import time
from functools import partial
from typing import cast

from aiohttp import web

from pyserve.api.endpoints import prompts
from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.logprobs import read_completion_tokens
from pyserve.api.endpoints.openai import (
    OpenAIFrames,
    encode_whole,
    make_job,
    prompt_fields,
    told_of,
)
from pyserve.api.endpoints.structured import read_constraint
from pyserve.api.generation.generate import Choice
from pyserve.api.generation.job import Job, Prompt
from pyserve.api.state import STATE, Loaded
from pyserve.api.wire.protocol import (
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionRequest,
    CompletionResponse,
)
from pyserve.errors import InvalidRequestError
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Content, Part, content_of
from pyserve.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
WIRE = Wire(CompletionRequest)


async def completions(request: web.Request) -> web.StreamResponse:
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await WIRE.read(request, state, max_list_ids=loaded.engine.info.max_model_len)
    state.check_model_name(body.model)
    if body.prompt is None:
        raise InvalidRequestError("prompt is missing", "prompt")
    cut = prompts.truncation(
        body,
        max_model_len=loaded.engine.info.max_model_len,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
    )
    if cut is None and body.truncation_side is not None:
        ignored = [*ignored, "truncation_side"]
    read = partial(_read_prompts, loaded, body, body.prompt, cut)
    read_prompts = await state.run_text(request, prompts.size_of(body.prompt), read)
    ignored = [*ignored]
    make_constraint = await read_constraint(request, state, loaded, body, ignored=ignored)
    tokens = read_completion_tokens(body, state, loaded, ignored)
    is_shown_only = bool(body.echo) and body.max_tokens == 0
    is_run = not is_shown_only or tokens.num_prompt_logprobs is not None
    job = await make_job(
        body,
        loaded,
        read_prompts,
        prompt_name="prompt",
        limit=("max_tokens", body.max_tokens),
        default_max_tokens=DEFAULT_MAX_TOKENS,
        ignored=ignored,
        is_run=is_run,
        is_prompt_only=is_shown_only and is_run,
        tokens=tokens,
        make_constraint=make_constraint,
    )
    return await answer(request, loaded.engine, job, DIALECT, arrived_s=arrived_s)


def _read_prompts(
    loaded: Loaded,
    body: CompletionRequest,
    prompt: prompts.PromptField,
    cut: prompts.Truncation | None,
) -> list[Prompt]:
    """Tokenise every prompt; with `echo`, each Prompt also has the text that its answers repeat.

    Raises InvalidRequestError.
    """
    tokenizer = loaded.tokenizer
    skip = body.skip_special_tokens is not False
    token_ids = prompts.read_token_ids(
        loaded, prompt, name="prompt", add_special_tokens=body.add_special_tokens is not False,
        cut=cut,
    )  # fmt: skip
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not body.echo:
        echoes = [""] * len(token_ids)
    elif cut is None and isinstance(texts[0], str):
        echoes = cast("list[str]", texts)
    else:
        echoes = [tokenizer.decode(ids, skip_special_tokens=skip) for ids in token_ids]
    is_told = bool(body.echo) and body.logprobs is not None and body.logprobs is not False
    return [
        Prompt(
            ids,
            echo,
            Detokenizer(tokenizer, ids, skip_special_tokens=skip),
            _offsets(tokenizer, ids, len(echo), skip) if is_told else None,
        )
        for ids, echo in zip(token_ids, echoes, strict=True)
    ]


def _offsets(
    tokenizer: Tokenizer, token_ids: list[int], num_chars: int, skip_special_tokens: bool
) -> list[int]:
    """For each token the position, in characters, where its text begins in the prompt's text.

    num_chars  length of the prompt's text, which no offset exceeds.
    """
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    offsets, end = [], 0
    for token_id in token_ids:
        offsets.append(min(end, num_chars))
        end += len(detokenizer.push([token_id]))
    return offsets


class CompletionFrames(OpenAIFrames):
    """Streamed `text_completion` objects."""

    chunk_type = CompletionChunk

    def __init__(self, head: Head, job: Job) -> None:
        super().__init__(head, job)
        self._begun: set[int] = set()  # indices of the choices that have sent their prompt's ids

    def entry(
        self, choice: Choice, part: Part | None, *, is_last: bool = False
    ) -> CompletionChunkChoice:
        """The element of `choices` for one more part; see OpenAIFrames.entry."""
        assert part is None or isinstance(part, Content), "a completion is content only"
        text = "" if part is None else part.text
        logprobs = prompt_token_ids = token_ids = None
        if choice.words is not None and part is not None:
            logprobs = choice.words.completion(part.tokens) if part.tokens else None
            token_ids = choice.words.ids(part.tokens)
            if choice.words.has_ids and choice.index not in self._begun:
                self._begun.add(choice.index)
                prompt_token_ids = list(choice.prompt_token_ids)
        return CompletionChunkChoice(
            index=choice.index,
            text=text,
            logprobs=logprobs,
            token_ids=token_ids,
            prompt_token_ids=prompt_token_ids,
            finish_reason=choice.finish_reason if is_last else None,
            stop_reason=choice.stop_reason if is_last else None,
        )


def _choice(choice: Choice) -> CompletionChoice:
    words, tokens = choice.words, told_of(choice.parts)
    return CompletionChoice(
        index=choice.index,
        text=content_of(choice.parts),
        logprobs=words.completion(tokens) if words is not None else None,
        token_ids=words.ids(tokens) if words is not None else None,
        **prompt_fields(choice),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


DIALECT = Dialect(
    id_prefix="cmpl-",
    frames=CompletionFrames,
    whole=partial(encode_whole, CompletionResponse, _choice),
)
