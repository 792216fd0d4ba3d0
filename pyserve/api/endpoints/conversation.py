"""Messages -> prompt token ids through a chat template, for chats and for /tokenize alike.

A template is code and may run long. Short conversations are first rendered on the event loop with
a time limit of SHORT_RENDER_S; if that is exceeded, rendering starts over on a worker thread.
text/template_limits.py bounds the time and sizes of every rendering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import msgspec
from aiohttp import web

from pyserve.api.endpoints import prompts
from pyserve.api.endpoints.body import SHORT_BODY_BYTES
from pyserve.api.endpoints.tools import ToolUse, arguments_in, check_calls, plain_calls
from pyserve.api.generation.job import Prompt
from pyserve.api.http.uploads import NUM_BODY_BYTES
from pyserve.api.state import SHORT_TEXT_CHARS, Loaded, ServerState
from pyserve.api.wire.protocol import (
    EFFORTS,
    MAX_DOCUMENTS,
    MAX_MESSAGES,
    MAX_NESTING,
    MAX_TEMPLATE_CHARS,
    MAX_TEMPLATE_KWARGS,
    MAX_TEMPLATE_KWARGS_CHARS,
    ROLES,
    ChatRequest,
    Message,
    TokenizeRequest,
)
from pyserve.api.wire.tools import MAX_SCHEMA_NESTING
from pyserve.errors import (
    ChatTemplateError,
    CheckpointError,
    ContextError,
    InvalidRequestError,
)
from pyserve.params import INT64_MAX, INT64_MIN
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.reasoning import Opening, opened_thinking
from pyserve.text.template_limits import MAX_RENDER_S
from pyserve.text.template_probe import REASONING
from pyserve.text.told_tools import calls_in_words, in_words
from pyserve.text.tool_parsers.registry import JSON_FORMAT, ToolFormat

MESSAGE_CHARS = 32  # cost of rendering a message besides its text, in characters of text
SHORT_RENDER_S = 0.02  # time limit of a rendering on the event loop
MAX_TEMPLATES = 8  # compiled templates from requests that are cached


@dataclass(frozen=True, slots=True)
class Conversation:
    """The prompt of a chat.

    ignored  names of fields without effect, mostly as the template does not use them.
    opening  whether the prompt leaves the answer inside reasoning ("open"), behind it ("closed") or
             neither ("unsaid").
    opened   the <think> marker that ends the prompt if there is no reasoning parser; "" if the
             prompt does not end with one.
    merged   how messages were merged or reordered; see text/turn_order.in_order.
    """

    prompt: Prompt
    ignored: list[str]
    opening: Opening = "unsaid"
    opened: str = ""
    merged: str = ""


async def read_conversation(
    request: web.Request,
    state: ServerState,
    loaded: Loaded,
    body: ChatRequest | TokenizeRequest,
    *,
    max_tokens: int,
    tools: ToolUse,
) -> Conversation:
    """Render the messages of `body` with a chat template and tokenise the result.

    request     the HTTP request that `body` comes from.
    max_tokens  output tokens for which truncate_prompt_tokens -1 leaves room.
    tools       the tools of `body`. Special tokens that mark calls in their format stay visible in
                the answer's text, where the tool parser looks for them.

    Raises InvalidRequestError and NotBuiltError naming the field, ChatTemplateError.
    """
    messages = body.messages or []
    if not messages:
        raise InvalidRequestError(
            f"messages must hold 1 to {MAX_MESSAGES} messages, got 0", "messages"
        )
    kwargs = body.chat_template_kwargs or {}
    defaults = state.config.default_chat_template_kwargs or {}
    max_model_len = loaded.engine.info.max_model_len
    cut = prompts.truncation(body, max_model_len=max_model_len, max_tokens=max_tokens)
    source = _own_template(state, body.chat_template)
    effort = _effort_kwargs(body.reasoning_effort)

    def measure() -> int:
        num_chars = _check_messages(messages) + _check_kwargs(kwargs)
        num_chars += _check_documents(body.documents or [])
        num_chars += _measure(tools.shown, "tools", limit=MAX_SCHEMA_NESTING)
        prompts.check_chars(num_chars, max_model_len=max_model_len, param="messages")
        return num_chars + MESSAGE_CHARS * len(messages)

    def read(time_limit_s: float) -> Conversation:
        template = loaded.chat_template
        if source is not None:
            template = _compile(template, source)
        unused = template.unused({**effort, **kwargs}, has_tools=bool(tools.shown))
        used_effort = {n: effort[n] for n in effort if n not in kwargs and n not in unused}
        used = {**defaults, **used_effort, **kwargs}
        token_ids, merged = _encode(
            loaded, template, body, messages, tools, used, cut, time_limit_s
        )
        ignored = [f"chat_template_kwargs.{name}" for name in unused if name in kwargs]
        if effort and not used_effort:
            ignored.append("reasoning_effort")
        if cut is None and body.truncation_side is not None:
            ignored.append("truncation_side")
        ignored += _not_shown(template, messages, tools)
        prompt = _prompt(loaded, body, messages[-1], tools, token_ids)
        parser = loaded.reasoning
        if parser is None:
            is_begun = body.add_generation_prompt is not False and not body.continue_final_message
            opened = opened_thinking(loaded.tokenizer, token_ids) if is_begun else ""
            return Conversation(prompt, ignored, opened=opened, merged=merged)
        continued = _echo(messages[-1]) if body.continue_final_message else None
        opening = parser.opening(token_ids, continued=continued)
        return Conversation(prompt, ignored, opening, merged=merged)

    def read_long() -> Conversation:
        measure()
        return read(MAX_RENDER_S)

    num_bytes = request[NUM_BODY_BYTES]
    if num_bytes > SHORT_BODY_BYTES:
        return await state.run_text(request, num_bytes, read_long, short=0)
    size = measure()
    if source is None and size <= SHORT_TEXT_CHARS:
        try:
            return read(SHORT_RENDER_S)
        except ChatTemplateError as error:
            if not error.is_timeout:
                raise
    return await state.run_text(request, size, partial(read, MAX_RENDER_S), short=0)


def _encode(
    loaded: Loaded,
    template: ChatTemplate,
    body: ChatRequest | TokenizeRequest,
    messages: list[Message],
    tools: ToolUse,
    variables: Mapping[str, Any],
    cut: prompts.Truncation | None,
    time_limit_s: float,
) -> tuple[list[int], str]:
    """The token ids of the prompt, and how messages were merged or reordered (see in_order)."""
    plain = [_plain(message, f"messages[{i}]", loaded.tools) for i, message in enumerate(messages)]
    plain = _told(plain, template, tools, loaded.tools)
    continues = bool(body.continue_final_message)
    add_generation_prompt = body.add_generation_prompt
    try:
        text = template.render(
            plain,
            tools.shown,
            add_generation_prompt=(
                not continues if add_generation_prompt is None else add_generation_prompt
            ),
            continue_final_message=continues,
            template_kwargs=variables,
            documents=body.documents,
            time_limit_s=time_limit_s,
        )
    except ChatTemplateError as error:
        if body.chat_template is None:
            raise
        raise InvalidRequestError(error.message, "chat_template") from error
    max_model_len = loaded.engine.info.max_model_len
    add_special_tokens = body.add_special_tokens is True
    if cut is None:
        prompts.check_may_fit(loaded.tokenizer, text, max_model_len=max_model_len, param="messages")
    else:
        prompts.check_size(len(text), max_model_len=max_model_len, param="messages")
    # check_may_fit does not count texts of up to PIECE_CHARS characters, so these may make more
    # tokens than the context; for a chat, sampling.Resolver refuses such a prompt later.
    max_tokens = max(max_model_len, prompts.PIECE_CHARS)
    if cut is not None:
        max_tokens = prompts.max_tokenize_tokens(max_model_len)
    ids = loaded.tokenizer.encode_chat(
        text, add_special_tokens=add_special_tokens, max_tokens=max_tokens
    )
    if len(ids) > max_tokens:
        raise ContextError(
            f"messages make at least {len(ids)}",
            "messages",
            num_tokens=len(ids),
            max_model_len=max_tokens,
        )
    if cut is not None:
        ids = cut.cut_text(loaded.tokenizer, ids, has_special_tokens=add_special_tokens)
    if not ids:
        raise InvalidRequestError("messages make an empty prompt", "messages")
    return ids, text.merged


def _prompt(
    loaded: Loaded,
    body: ChatRequest | TokenizeRequest,
    last: Message,
    tools: ToolUse,
    token_ids: list[int],
) -> Prompt:
    """The Prompt of the job. A TokenizeRequest needs only its token ids."""
    tokenizer = loaded.tokenizer
    if not isinstance(body, ChatRequest):
        return Prompt(token_ids, "", Detokenizer(tokenizer, token_ids, skip_special_tokens=True))
    detokenizer = Detokenizer(
        tokenizer,
        token_ids,
        skip_special_tokens=body.skip_special_tokens is not False,
        shown=_marker_ids(loaded, tools),
    )
    echo = _echo(last) if body.echo else ""
    text = None
    if body.return_prompt_text:
        text = tokenizer.decode(token_ids, skip_special_tokens=False)
    return Prompt(token_ids, echo, detokenizer, text=text)


def _marker_ids(loaded: Loaded, tools: ToolUse) -> frozenset[int]:
    """Special tokens that stay in an answer's text, so that its parsers can find their markers."""
    ids: frozenset[int] = frozenset()
    if loaded.reasoning is not None:
        ids |= loaded.reasoning.marker_ids
    if tools.format is not None:
        ids |= tools.format.marker_ids
    return ids


def _not_shown(template: ChatTemplate, messages: list[Message], tools: ToolUse) -> list[str]:
    """Names of the messages' fields that do not appear in the prompt."""
    has_tools = bool(tools.shown)
    without_effect = {
        "messages.name": lambda m: m.name and not template.shows_name(m.role, has_tools=has_tools),
        "messages.tool_call_id": lambda m: m.tool_call_id and m.role != "tool",
    }
    names = [name for name, is_so in without_effect.items() if any(map(is_so, messages))]
    return names + _unshown_reasoning(template, messages, has_tools=has_tools)


def _told(
    messages: list[dict[str, Any]],
    template: ChatTemplate,
    tools: ToolUse,
    format: ToolFormat | None,
) -> list[dict[str, Any]]:
    """Write tools, their calls and results into the messages' texts if the template shows none.

    messages  as `_plain` makes them; returned as they are if the template can show everything.
    format    the server's tool format, in which calls of earlier turns are written; None: JSON.
    """
    if tools.shown:
        if not template.unused(["tools"], has_tools=True):
            return messages
        has_system = template.shows_role("system", has_tools=True)
        written = (tools.format or JSON_FORMAT).written
        return in_words(messages, tools.shown, written, has_system=has_system)
    has_calls = any(m["role"] == "tool" or "tool_calls" in m for m in messages)
    if not has_calls or template.shows_role("tool"):
        return messages
    return calls_in_words(messages, (format or JSON_FORMAT).written)


def _effort_kwargs(effort: str | None) -> dict[str, Any]:
    """The template variables that reasoning_effort sets, as in vLLM."""
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise InvalidRequestError(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort[:40]}",
            "reasoning_effort",
        )
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def _own_template(state: ServerState, source: str | None) -> str | None:
    """The chat template of a request, checked; None if it has none.

    Raises InvalidRequestError if the server does not accept templates or this one is too long.
    """
    if source is None:
        return None
    if not state.config.trust_request_chat_template:
        raise InvalidRequestError(
            "chat_template: this server takes no template from a request "
            "(--trust-request-chat-template)",
            "chat_template",
        )
    if len(source) > MAX_TEMPLATE_CHARS:
        raise InvalidRequestError(
            f"chat_template has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}",
            "chat_template",
        )
    return source


@lru_cache(maxsize=MAX_TEMPLATES)
def _compile(template: ChatTemplate, source: str) -> ChatTemplate:
    try:
        return template.with_source(source, origin="chat_template")
    except CheckpointError as error:
        raise InvalidRequestError(str(error), "chat_template") from error


def _check_messages(messages: list[Message]) -> int:
    """Check the tool calls in messages; returns the number of characters in all messages."""
    check_calls(messages)
    num_chars = _measure(arguments_in(messages), "messages", limit=MAX_SCHEMA_NESTING)
    return num_chars + sum(map(_num_chars, messages))


def _check_kwargs(kwargs: Mapping[str, Any]) -> int:
    """Check the limits of chat_template_kwargs; returns the number of characters in them."""
    name = "chat_template_kwargs"
    if len(kwargs) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequestError(
            f"{name} has {len(kwargs)} entries, the limit is {MAX_TEMPLATE_KWARGS}", name
        )
    num_chars = _measure(kwargs, name)
    if num_chars > MAX_TEMPLATE_KWARGS_CHARS:
        raise InvalidRequestError(
            f"{name} holds {num_chars} characters, the limit is {MAX_TEMPLATE_KWARGS_CHARS}", name
        )
    return num_chars


def _check_documents(documents: list[str | dict[str, Any]]) -> int:
    """Check the limits of documents; returns the number of characters in them."""
    if len(documents) > MAX_DOCUMENTS:
        raise InvalidRequestError(
            f"documents has {len(documents)} entries, the limit is {MAX_DOCUMENTS}", "documents"
        )
    return _measure(documents, "documents")


def _measure(value: object, name: str, *, limit: int = MAX_NESTING, depth: int = 0) -> int:
    """The size of JSON-like data: its characters, with one for each value that is no string.

    Raises InvalidRequestError naming the field `name` if the data is nested deeper than `limit`
    or holds an integer of more than 64 bits.
    """
    if depth > limit:
        raise InvalidRequestError(f"{name} is nested deeper than {limit}", name)
    inner = partial(_measure, name=name, limit=limit, depth=depth + 1)
    if isinstance(value, dict):
        return sum(len(key) + 1 + inner(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(1 + inner(item) for item in value)
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        raise InvalidRequestError(f"{name} holds an integer of more than 64 bits", name)
    return len(value) if isinstance(value, str) else 1


def _plain(message: Message, path: str, format: ToolFormat | None) -> dict[str, Any]:
    """A message as ChatTemplate takes it; ChatTemplate checks the content parts itself.

    path    the message's place in the request, such as "messages[0]", which errors name.
    format  the server's tool format, which may restrict the ids of calls.
    """
    if message.role not in ROLES:
        raise InvalidRequestError(
            f"{path}.role must be one of {', '.join(ROLES)}, got {message.role[:40]}",
            f"{path}.role",
        )
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
    if message.role == "assistant" and (
        reasoning := message.reasoning_content or message.reasoning
    ):
        plain[REASONING[0]] = reasoning
    return {**plain, **plain_calls(message, format)}


def _texts(message: Message) -> list[str]:
    """The texts in the content of a message, one for each part."""
    content = message.content
    if content is None or isinstance(content, str):
        return [content or ""]
    return [p if isinstance(p, str) else p.text or p.refusal or "" for p in content]


def _num_chars(message: Message) -> int:
    reasoning = message.reasoning_content or message.reasoning or ""
    return sum(map(len, _texts(message))) + len(reasoning)


def _unshown_reasoning(
    template: ChatTemplate, messages: list[Message], *, has_tools: bool
) -> list[str]:
    """Names of the messages' reasoning fields that do not appear in the prompt."""
    is_shown = template.shows_reasoning(has_tools=has_tools)
    return [
        f"messages.{name}"
        for name in ("reasoning", "reasoning_content")
        if any(getattr(m, name) and not (is_shown and m.role == "assistant") for m in messages)
    ]


def _echo(message: Message) -> str:
    """The text of an assistant's message; "" for any other role."""
    return "\n".join(_texts(message)) if message.role == "assistant" else ""
