"""POST /v1/chat/completions: messages -> prompt -> answer as chat objects."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from pyserve.api.answer import FINGERPRINT, Endpoint, answer
from pyserve.api.body import Wire, check_built
from pyserve.api.generate import Choice, Generation
from pyserve.api.prompts import check_chars, check_may_fit
from pyserve.api.protocol import (
    MAX_MESSAGES,
    ChatChoice,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Message,
)
from pyserve.api.state import STATE, Loaded, ServerState
from pyserve.api.stream import ChatFrames
from pyserve.errors import InvalidRequestError, NotBuiltError

# A fixed set: templates put the role into their markup, where any other text could forge some.
ROLES = ("system", "developer", "user", "assistant")
ROLES_NOT_BUILT = ("tool", "function")
MESSAGE_CHARS = 32  # what rendering a message costs, in characters of text
WIRE = Wire(ChatRequest)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    arrived_s = time.monotonic()
    state = request.app[STATE]
    loaded = state.model_with_room()
    body, ignored = await WIRE.read(request, state)
    state.check_model_name(body.model)
    prompt = await tokenize_messages(
        state, loaded, body.messages, add_special_tokens=body.add_special_tokens is True
    )
    return await answer(
        request,
        state,
        loaded,
        endpoint=ENDPOINT,
        body=body,
        ignored=ignored,
        prompts=[prompt],
        arrived_s=arrived_s,
    )


async def tokenize_messages(
    state: ServerState, loaded: Loaded, messages: list[Message], *, add_special_tokens: bool
) -> list[int]:
    """Token ids of the prompt that the model's chat template makes of `messages`."""
    if not messages:
        raise InvalidRequestError(
            f"messages must hold 1 to {MAX_MESSAGES} messages, got 0", "messages"
        )

    num_chars = sum(map(_num_chars, messages))
    max_model_len = loaded.engine.info.max_model_len
    check_chars(loaded.tokenizer, num_chars, max_model_len=max_model_len, param="messages")

    def tokenize() -> list[int]:
        plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
        text = loaded.chat_template.render(plain)
        check_may_fit(loaded.tokenizer, text, max_model_len=max_model_len, param="messages")
        return loaded.tokenizer.encode_chat(text, add_special_tokens=add_special_tokens)

    prompt = await state.run_text(num_chars + MESSAGE_CHARS * len(messages), tokenize)
    if not prompt:
        raise InvalidRequestError("messages make an empty prompt", "messages")
    return prompt


def _plain(message: Message, path: str) -> dict[str, Any]:
    """What the template gets to see: the role, the text or its parts, and the name.

    Parts are checked by ChatTemplate.
    """
    if message.role in ROLES_NOT_BUILT:
        raise NotBuiltError(
            f"{path}.role: the role {message.role} is not built yet", f"{path}.role"
        )
    if message.role not in ROLES:
        raise InvalidRequestError(
            f"{path}.role must be one of {', '.join(ROLES)}, got {message.role[:40]}",
            f"{path}.role",
        )
    for name in ("tool_calls", "tool_call_id", "function_call"):
        check_built(name, getattr(message, name), f"{path}.{name}")
    content = message.content
    if content is None and message.role != "assistant":
        raise InvalidRequestError(
            f"{path}.content must be a string or a list of parts, got null", f"{path}.content"
        )
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if isinstance(content, list):
        plain["content"] = [p if isinstance(p, str) else msgspec.structs.asdict(p) for p in content]
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _num_chars(message: Message) -> int:
    content = message.content
    if content is None or isinstance(content, str):
        return len(content or "")
    texts = [p if isinstance(p, str) else p.text or p.refusal or "" for p in content]
    return sum(map(len, texts))


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
