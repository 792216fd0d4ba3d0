"""POST /v1/chat/completions: messages -> Job; parts of the answer -> chat completion objects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET

from pyserve.api.endpoints.answer import Dialect, Head, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.chat_job import chat_job
from pyserve.api.endpoints.functions import with_tools
from pyserve.api.endpoints.openai import (
    OpenAIFrames,
    encode_whole,
    prompt_fields,
    told_of,
)
from pyserve.api.generation.generate import Choice
from pyserve.api.generation.job import Job
from pyserve.api.generation.told import Told
from pyserve.api.state import STATE
from pyserve.api.wire.logprobs import ChatLogprobs
from pyserve.api.wire.protocol import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    CompletionTokensDetails,
    FunctionDelta,
    MessageToolCall,
    ToolCallDelta,
)
from pyserve.text.parts import (
    Content,
    Part,
    Reasoning,
    ToolCall,
    content_of,
    reasoning_of,
    tool_calls_of,
)

WIRE = Wire(ChatRequest)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await WIRE.read(request, state)
    state.check_model_name(body.model)
    asked = with_tools(body)
    with asked.renamed.errors():
        job = await chat_job(request, state, loaded, asked.body, ignored=ignored)
    ignored = [*asked.ignored, *map(asked.renamed, job.ignored)]
    job = msgspec.structs.replace(job, ignored=list(dict.fromkeys(ignored)))
    dialect = DIALECT
    if asked.is_asked:
        dialect = FUNCTIONS
        if job.ending.call_reason == "tool_calls":
            ending = replace(job.ending, call_reason="function_call")
            job = msgspec.structs.replace(job, ending=ending)
    return await answer(request, loaded.engine, job, dialect, arrived_s=arrived_s)


class ChatFrames(OpenAIFrames):
    """`chat.completion.chunk` objects."""

    chunk_type = ChatChunk

    def __init__(self, head: Head, job: Job) -> None:
        super().__init__(head, job)
        self._callers: set[int] = set()  # indices of the choices that have called a tool

    def first(self, choice: Choice) -> bytes:
        """The chunk that opens a choice: it has the role, and no output token is counted yet.

        It also has the token ids and text of the prompt, if the request asked for them.
        """
        entry = ChatChunkChoice(
            index=choice.index,
            delta=ChatDelta(role="assistant", content=""),
            logprobs=None,
            finish_reason=None,
        )
        usage = self.usage_so_far(choice)
        if usage:
            details = usage.completion_tokens_details and CompletionTokensDetails(0)
            usage = msgspec.structs.replace(
                usage,
                completion_tokens=0,
                total_tokens=usage.prompt_tokens,
                completion_tokens_details=details,
            )
        ids = prompt_fields(choice).get("prompt_token_ids")
        text = choice.prompt_text
        return self.chunk([entry], usage=usage, prompt_token_ids=ids, prompt_text=text)

    def entry(self, choice: Choice, part: Part | None, *, is_last: bool = False) -> ChatChunkChoice:
        """The element of `choices` for one more part; see OpenAIFrames.entry."""
        if isinstance(part, ToolCall):
            self._callers.add(choice.index)
        has_called = choice.index in self._callers
        delta = _delta(part, has_called=has_called)
        logprobs, token_ids = _tokens(choice, part.tokens if part is not None else ())
        return ChatChunkChoice(
            index=choice.index,
            delta=delta,
            logprobs=logprobs,
            finish_reason=_finish_reason(choice, has_called=has_called) if is_last else None,
            stop_reason=choice.stop_reason if is_last else UNSET,
            token_ids=token_ids,
        )


class FunctionFrames(ChatFrames):
    """Chunks of a request that uses the old `functions`: a call is `function_call`."""

    def entry(self, choice: Choice, part: Part | None, *, is_last: bool = False) -> ChatChunkChoice:
        entry = super().entry(choice, part, is_last=is_last)
        if not entry.delta.tool_calls:
            return entry
        delta = ChatDelta(function_call=entry.delta.tool_calls[0].function)
        return msgspec.structs.replace(entry, delta=delta)


def _delta(part: Part | None, *, has_called: bool) -> ChatDelta:
    if isinstance(part, Content):
        return ChatDelta(content=part.text)
    if isinstance(part, Reasoning):
        return ChatDelta(reasoning=part.text, reasoning_content=part.text)
    if part is None:  # after a call the content stays null: no empty text may be sent
        return ChatDelta() if has_called else ChatDelta(content="")
    function = FunctionDelta(
        name=UNSET if part.name is None else part.name, arguments=part.arguments
    )
    call = ToolCallDelta(index=part.index, function=function)
    if part.id is not None:
        call = ToolCallDelta(id=part.id, type="function", index=part.index, function=function)
    return ChatDelta(tool_calls=[call])


def _finish_reason(choice: Choice, *, has_called: bool) -> str | None:
    """The finish reason; `call_reason` instead of "stop" if the answer has called a tool."""
    if has_called and choice.finish_reason == "stop":
        return choice.ending.call_reason
    return choice.finish_reason


def _message(parts: list[Part]) -> ChatMessage:
    content, reasoning = content_of(parts), reasoning_of(parts) or None
    calls = [
        MessageToolCall(id=call.id or "", function=CalledFunction(call.name or "", call.arguments))
        for call in tool_calls_of(parts)
    ]
    return ChatMessage(
        content=None if not content and (reasoning or calls) else content,
        tool_calls=calls or UNSET,
        reasoning=reasoning,
        reasoning_content=reasoning,
    )


def _tokens(choice: Choice, tokens: Sequence[Told]) -> tuple[ChatLogprobs | None, list[int] | None]:
    """The logprobs and the ids of tokens, each None if the request did not ask for them."""
    words = choice.words
    if words is None or not tokens:
        return None, None
    return words.chat(tokens), words.ids(tokens)


def _choice(choice: Choice) -> ChatChoice:
    message = _message(choice.parts)
    logprobs, token_ids = _tokens(choice, told_of(choice.parts))
    return ChatChoice(
        index=choice.index,
        message=message,
        logprobs=logprobs,
        token_ids=token_ids,
        finish_reason=_finish_reason(choice, has_called=message.tool_calls is not UNSET),
        stop_reason=choice.stop_reason,
    )


def _function_choice(choice: Choice) -> ChatChoice:
    """As `_choice`, for a request that uses the old `functions`."""
    told = _choice(choice)
    if not told.message.tool_calls:
        return told
    called = told.message.tool_calls[0].function
    message = msgspec.structs.replace(told.message, tool_calls=UNSET, function_call=called)
    return msgspec.structs.replace(told, message=message)


def _prompt_fields(choice: Choice) -> dict[str, Any]:
    return {**prompt_fields(choice), "prompt_text": choice.prompt_text}


DIALECT = Dialect(
    id_prefix="chatcmpl-",
    frames=ChatFrames,
    whole=partial(encode_whole, ChatResponse, _choice, describe_prompt=_prompt_fields),
)
FUNCTIONS = Dialect(
    id_prefix="chatcmpl-",
    frames=FunctionFrames,
    whole=partial(encode_whole, ChatResponse, _function_choice, describe_prompt=_prompt_fields),
)
