"""POST /v1/chat/completions: messages -> prompt -> answer as chat objects."""

from __future__ import annotations

import time

from aiohttp import web

from pyserve.api.endpoints.answer import FINGERPRINT, Endpoint, answer
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.conversation import read_conversation
from pyserve.api.generation.generate import Choice, Generation
from pyserve.api.generation.stream import ChatFrames
from pyserve.api.state import STATE
from pyserve.api.wire.protocol import ChatChoice, ChatMessage, ChatRequest, ChatResponse

WIRE = Wire(ChatRequest)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room(request)
    body, ignored = await WIRE.read(request, state)
    state.check_model_name(body.model)
    max_tokens = body.max_completion_tokens or body.max_tokens or 1
    conversation = await read_conversation(request, state, loaded, body, max_tokens=max_tokens)
    ignored = [*ignored, *conversation.ignored]
    if body.echo and not conversation.prompt.echo:
        ignored.append("echo")
    return await answer(
        request,
        state,
        loaded,
        endpoint=ENDPOINT,
        body=body,
        ignored=ignored,
        prompts=[conversation.prompt],
        arrived_s=arrived_s,
    )


def _whole(request_id: str, created: int, model: str, generation: Generation) -> ChatResponse:
    return ChatResponse(
        id=request_id,
        created=created,
        model=model,
        choices=[_choice(choice) for choice in generation.choices],
        system_fingerprint=FINGERPRINT,
        usage=generation.usage(),
    )


def _choice(choice: Choice) -> ChatChoice:
    return ChatChoice(
        index=choice.index,
        message=ChatMessage(content="".join(choice.pieces)),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


ENDPOINT = Endpoint(
    id_prefix="chatcmpl-",
    prompt_name="messages",
    default_max_tokens=None,
    frames=ChatFrames,
    whole=_whole,
)
