"""POST /v1/chat/completions: messages -> Job, parts -> chat objects."""

from __future__ import annotations

import time
from functools import partial

import msgspec
from aiohttp import web

from pyserve.api.endpoints.answer import Dialect, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.conversation import read_conversation
from pyserve.api.endpoints.openai import OpenAIFrames, encode_whole, make_job
from pyserve.api.generation.generate import Choice
from pyserve.api.state import STATE
from pyserve.api.wire.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChatResponse,
)
from pyserve.text.parts import Part, content_of

WIRE = Wire(ChatRequest)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await WIRE.read(request, state)
    state.check_model_name(body.model)
    max_tokens = body.max_completion_tokens or body.max_tokens or 1
    conversation = await read_conversation(
        request,
        state,
        loaded,
        body,
        max_tokens=max_tokens,
        echo=bool(body.echo),
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    ignored = [*ignored, *conversation.ignored]
    if body.echo and not conversation.prompt.echo:
        ignored.append("echo")
    limit = "max_tokens", body.max_tokens
    if body.max_completion_tokens is not None:
        limit = "max_completion_tokens", body.max_completion_tokens
    job = await make_job(
        body,
        loaded,
        [conversation.prompt],
        prompt_name="messages",
        limit=limit,
        default_max_tokens=loaded.defaults.max_new_tokens,
        ignored=ignored,
    )
    return await answer(request, loaded.engine, job, DIALECT, arrived_s=arrived_s)


class ChatFrames(OpenAIFrames):
    """`chat.completion.chunk` objects."""

    chunk_type = ChatChunk

    def first(self, choice: Choice) -> bytes:
        """Whose message it is, before any token of it is counted."""
        entry = ChatChunkChoice(
            index=choice.index,
            delta=ChatDelta(role="assistant", content=""),
            logprobs=None,
            finish_reason=None,
        )
        usage = self.usage_so_far(choice)
        if usage:
            usage = msgspec.structs.replace(
                usage, completion_tokens=0, total_tokens=usage.prompt_tokens
            )
        return self.chunk([entry], usage=usage, prompt_token_ids=None, prompt_text=None)

    def entry(self, choice: Choice, part: Part, *, is_last: bool = False) -> ChatChunkChoice:
        """The element of `choices` that has one part more, or the last one."""
        delta = ChatDelta(content=part.text)
        if not is_last:
            return ChatChunkChoice(
                index=choice.index, delta=delta, logprobs=None, finish_reason=None, token_ids=None
            )
        return ChatChunkChoice(
            index=choice.index,
            delta=delta,
            logprobs=None,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=None,
        )


def _choice(choice: Choice) -> ChatChoice:
    return ChatChoice(
        index=choice.index,
        message=ChatMessage(content=content_of(choice.parts)),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


DIALECT = Dialect(
    id_prefix="chatcmpl-", frames=ChatFrames, whole=partial(encode_whole, ChatResponse, _choice)
)
