"""POST /v1/chat/completions: messages -> Job, parts -> chat objects."""

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
from pyserve.api.endpoints.conversation import read_conversation
from pyserve.api.endpoints.logprobs import read_chat_tokens
from pyserve.api.endpoints.openai import (
    OpenAIFrames,
    encode_whole,
    make_job,
    prompt_fields,
    told_of,
)
from pyserve.api.endpoints.structured import read_constraint
from pyserve.api.endpoints.thinking import makes_thinking_budget
from pyserve.api.endpoints.tool_grammar import hold_to_tools
from pyserve.api.endpoints.tools import read_tools, with_parser
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
from pyserve.constraints import makes_all_of, unconstrained
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
    max_tokens = body.max_completion_tokens or body.max_tokens or 1
    has_auto = state.config.enable_auto_tool_choice
    tools = with_parser(read_tools(body), loaded.tools, has_auto=has_auto)
    tools, held = await hold_to_tools(request, state, loaded, body, tools)
    conversation = await read_conversation(
        request, state, loaded, body, max_tokens=max_tokens, tools=tools
    )
    ignored = [*ignored, *tools.ignored, *conversation.ignored]
    if body.echo and not conversation.prompt.echo:
        ignored.append("echo")
    make_reasoning = free_until = None
    if loaded.reasoning is not None:
        is_hidden = body.include_reasoning is False
        opening = conversation.opening
        make_reasoning = partial(loaded.reasoning.stage, opening, is_hidden=is_hidden)
        free_until = loaded.reasoning.free_until(opening)
    elif body.include_reasoning is False:
        ignored.append("include_reasoning")
    makes_budget = makes_thinking_budget(body.thinking_token_budget, loaded, conversation, ignored)
    limit = "max_tokens", body.max_tokens
    if body.max_completion_tokens is not None:
        limit = "max_completion_tokens", body.max_completion_tokens
    if held is None:
        makes_grammar = await read_constraint(
            request, state, loaded, body, ignored=ignored, free_until=free_until
        )
    else:
        makes_grammar = held.makes(free_until)
    prompt = conversation.prompt
    if makes_grammar is unconstrained:  # else the answer has a form of its own
        prompt = replace(prompt, echo=prompt.echo + conversation.opened)
    tokens = read_chat_tokens(body, state, loaded, ignored)
    job = await make_job(
        body,
        loaded,
        [prompt],
        prompt_name="messages",
        limit=limit,
        default_max_tokens=loaded.defaults.max_new_tokens,
        ignored=ignored,
        make_reasoning=make_reasoning,
        make_constraint=makes_all_of([makes_budget, makes_grammar]),
        tokens=tokens,
    )
    job = tools.apply(job)
    return await answer(request, loaded.engine, job, DIALECT, arrived_s=arrived_s)


class ChatFrames(OpenAIFrames):
    """`chat.completion.chunk` objects."""

    chunk_type = ChatChunk

    def __init__(self, head: Head, job: Job) -> None:
        super().__init__(head, job)
        self._callers: set[int] = set()  # choices that have called a tool

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
        """The element of `choices` that has one part more, or the last one, if one is left."""
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


def _delta(part: Part | None, *, has_called: bool) -> ChatDelta:
    if isinstance(part, Content):
        return ChatDelta(content=part.text)
    if isinstance(part, Reasoning):
        return ChatDelta(reasoning=part.text, reasoning_content=part.text)
    if part is None:  # a message with calls has null for content that is empty
        return ChatDelta() if has_called else ChatDelta(content="")
    function = FunctionDelta(
        name=UNSET if part.name is None else part.name, arguments=part.arguments
    )
    call = ToolCallDelta(index=part.index, function=function)
    if part.id is not None:
        call = ToolCallDelta(id=part.id, type="function", index=part.index, function=function)
    return ChatDelta(tool_calls=[call])


def _finish_reason(choice: Choice, *, has_called: bool) -> str | None:
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
    """What is told of tokens: their logprobs, and their ids."""
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


def _prompt_fields(choice: Choice) -> dict[str, Any]:
    return {**prompt_fields(choice), "prompt_text": choice.prompt_text}


DIALECT = Dialect(
    id_prefix="chatcmpl-",
    frames=ChatFrames,
    whole=partial(encode_whole, ChatResponse, _choice, describe_prompt=_prompt_fields),
)
