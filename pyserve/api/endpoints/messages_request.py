"""A Messages request -> the equivalent ChatRequest, and what the answer needs from the request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pyserve.api.endpoints.messages_turns import (
    chat_messages,
    is_shown,
    referenced_tools,
    system_message,
)
from pyserve.api.endpoints.renamed import Renamed, Rule
from pyserve.api.state import Loaded
from pyserve.api.wire.messages import (
    FORMAT_TYPES,
    MIN_THINKING_TOKENS,
    THINKING_DISPLAYS,
    THINKING_TYPES,
    TOOL_CHOICE_TYPES,
    CountTokensRequest,
    MessagesRequest,
    MessagesTool,
    OutputFormat,
    Thinking,
)
from pyserve.api.wire.protocol import (
    ChatRequest,
    JsonSchemaFormat,
    Message,
    ResponseFormat,
)
from pyserve.api.wire.tools import MAX_TOOLS, Function, NamedFunction, Tool, ToolChoice
from pyserve.errors import InvalidRequestError
from pyserve.params import shown

# Template variables that turn thinking on and off; the first that a template uses is set.
SWITCHES = ("enable_thinking", "thinking")
# For disabled thinking, if the template has no such variable, but knows reasoning_effort.
LEAST_EFFORT = "low"

_RULES: tuple[Rule, ...] = (
    (r"tool_choice\.function\.name", "tool_choice.name"),
    (r"parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    (r"thinking_token_budget", "thinking.budget_tokens"),
    (r"include_reasoning", "thinking"),
    (r"reasoning_effort", "output_config.effort"),
    (r"response_format\.json_schema\.schema", "output_config.format.schema"),
    (r"response_format", "output_config.format"),
    (r"messages\.reasoning_content", "messages.content.thinking"),
    (r"continue_final_message", "messages"),
    (r"^(each )?stop\b", r"\1stop_sequences"),
)


@dataclass(frozen=True, slots=True)
class Read:
    """A request, translated into a chat, and what its answer needs.

    renamed               turns names of the chat's fields into those that the client used.
    has_omitted_thinking  thinking blocks have no text; their signature holds it instead.
    max_tokens            the requested limit on output tokens.
    """

    chat: ChatRequest
    renamed: Renamed
    has_omitted_thinking: bool
    max_tokens: int


def read_request(
    body: CountTokensRequest, loaded: Loaded, defaults: Iterable[str], ignored: list[str]
) -> Read:
    """Check `body` and translate it into a chat.

    defaults  names of the variables that the server passes to every chat template.
    ignored   collects the names of fields that have no effect.

    Raises InvalidRequestError naming the field, ChatTemplateError.
    """
    if not body.messages:
        raise InvalidRequestError("messages must hold at least one message, got 0", "messages")
    messages: list[Message] = []
    places: list[str] = []  # for each message the path of its turn in the request
    system = None if body.system is None else system_message(body.system, ignored)
    if system is not None:
        messages.append(system)
        places.append("system")
    for message, path in chat_messages(body.messages, ignored):
        messages.append(message)
        places.append(path)
    last = messages[-1] if messages else None
    if last is not None and last.role == "assistant" and last.tool_calls:
        raise InvalidRequestError(
            f"{places[-1]}: the tool_use blocks of the last message have no tool_result",
            places[-1],
        )
    if last is not None and last.role == "assistant" and not last.content:
        messages.pop()  # an empty last message leaves nothing for the answer to continue
    fields = _sampling(body)
    max_tokens: int = fields.get("max_tokens", 1)
    tools, tool_places = _tools(body, ignored)
    kwargs = dict(body.chat_template_kwargs or {})
    effort = body.output_config.effort if body.output_config is not None else None
    thinking = _Thinking(body.thinking, loaded, has_tools=bool(tools))
    thinking.check(max_tokens if isinstance(body, MessagesRequest) else None)
    chat = ChatRequest(
        model=body.model,
        messages=messages,
        continue_final_message=True if messages and messages[-1].role == "assistant" else None,
        tools=tools or None,
        response_format=_format(body),
        chat_template_kwargs={**thinking.switch(set(kwargs), set(defaults)), **kwargs} or None,
        reasoning_effort=thinking.effort(effort),
        include_reasoning=thinking.is_included,
        thinking_token_budget=thinking.budget(ignored),
        **_tool_choice(body, tools),
        **fields,
    )
    display = body.thinking.display if body.thinking is not None else None
    renamed = Renamed([*_placed(places, tool_places), *_RULES])
    return Read(chat, renamed, display == "omitted", max_tokens)


def _placed(messages: Sequence[str], tools: Sequence[str]) -> list[Rule]:
    """Rules that turn indexed messages and tools of the chat into their places in the request."""
    return [
        (r"messages\[(\d+)\]", lambda found: messages[int(found[1])]),
        (
            r"tools\[(\d+)\]\.function\.parameters",
            lambda found: f"{tools[int(found[1])]}.input_schema",
        ),
        (r"tools\[(\d+)\](?:\.function)?", lambda found: tools[int(found[1])]),
    ]


def _sampling(body: CountTokensRequest) -> dict[str, Any]:
    if not isinstance(body, MessagesRequest):
        return {}
    return {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences or None,
        "stream": body.stream,
        "cache_salt": body.cache_salt,
    }


def _tools(body: CountTokensRequest, ignored: list[str]) -> tuple[list[Tool], list[str]]:
    """The tools that the client itself runs, and the place of each in the request.

    Others, such as Anthropic's server tools, and deferred tools that nothing refers to, are left
    out and added to `ignored`.
    """
    given = body.tools or []
    if len(given) > MAX_TOOLS:
        raise InvalidRequestError(
            f"tools has {len(given)} entries, the limit is {MAX_TOOLS}", "tools"
        )
    referenced = referenced_tools(body.messages)
    tools: list[Tool] = []
    places: list[str] = []
    for i, tool in enumerate(given):
        if not is_shown(tool, referenced):
            ignored.append(f"tools.{tool.name or tool.type or i}")
            continue
        tools.append(Tool("function", _function(tool, f"tools[{i}]")))
        places.append(f"tools[{i}]")
    return tools, places


def _function(tool: MessagesTool, path: str) -> Function:
    for name in ("name", "input_schema"):
        if getattr(tool, name) is None:
            raise InvalidRequestError(f"{path}.{name} is missing", f"{path}.{name}")
    return Function(tool.name or "", tool.description, tool.input_schema, tool.strict)


def _tool_choice(body: CountTokensRequest, tools: Sequence[Tool]) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {}
    _check_one_of(choice.type, TOOL_CHOICE_TYPES, "tool_choice.type")
    if choice.type in ("any", "tool") and not tools:
        raise InvalidRequestError(f"tool_choice: {choice.type} needs tools", "tool_choice")
    chosen: str | ToolChoice = "required" if choice.type == "any" else choice.type
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequestError("tool_choice.name is missing", "tool_choice.name")
        chosen = ToolChoice("function", NamedFunction(choice.name))
    is_alone = choice.disable_parallel_tool_use
    return {"tool_choice": chosen, "parallel_tool_calls": False if is_alone else None}


def _format(body: CountTokensRequest) -> ResponseFormat | None:
    format_: OutputFormat | None = body.output_config.format if body.output_config else None
    if format_ is None:
        return None
    _check_one_of(format_.type, FORMAT_TYPES, "output_config.format.type")
    schema = JsonSchemaFormat("answer", schema=format_.schema)
    return ResponseFormat("json_schema", json_schema=schema)


class _Thinking:
    """The chat fields for a request's `thinking`, as far as the model's template and parser allow.

    A request without `thinking` gets none, as Anthropic's clients expect: if the template cannot
    turn thinking off, the answer leaves it out.
    """

    def __init__(self, asked: Thinking | None, loaded: Loaded, *, has_tools: bool) -> None:
        self._asked = asked
        self._is_off = asked is None or asked.type == "disabled"
        self._has_parser = loaded.reasoning is not None
        self._unused: Callable[[Iterable[str]], list[str]] = lambda names: (
            loaded.chat_template.unused(names, has_tools=has_tools)
        )

    def check(self, max_tokens: int | None) -> None:
        """Check the fields. Raises InvalidRequestError naming the field.

        max_tokens  the requested limit; None if only prompt tokens are counted.
        """
        asked = self._asked
        if asked is None:
            return
        _check_one_of(asked.type, THINKING_TYPES, "thinking.type")
        if asked.display is not None:
            _check_one_of(asked.display, THINKING_DISPLAYS, "thinking.display")
        budget, name = asked.budget_tokens, "thinking.budget_tokens"
        if asked.type == "enabled" and budget is None:
            raise InvalidRequestError(f"{name} is missing", name)
        if budget is None:
            return
        if budget < MIN_THINKING_TOKENS:
            raise InvalidRequestError(
                f"{name} must be at least {MIN_THINKING_TOKENS}, got {shown(budget)}", name
            )
        if max_tokens is not None and budget >= max_tokens:
            raise InvalidRequestError(
                f"{name} must be less than max_tokens {shown(max_tokens)}, got {shown(budget)}",
                name,
            )

    def switch(self, given: set[str], defaults: set[str]) -> dict[str, Any]:
        """The template variable that turns thinking on or off; empty if it is to stay as it is.

        given     names of the variables that the request itself sets.
        defaults  names of the variables that the server sets; only an explicit "enabled" or
                  "disabled" overrides those.
        """
        known = [name for name in SWITCHES if not self._unused([name])]
        is_said = self._asked is not None and self._asked.type in ("enabled", "disabled")
        if not known or not given.isdisjoint(SWITCHES):
            return {}
        if not is_said and (self._asked is not None or not defaults.isdisjoint(SWITCHES)):
            return {}
        return {known[0]: not self._is_off}

    def effort(self, asked: str | None) -> str | None:
        """The chat's reasoning_effort; `asked` is the request's."""
        has_switch = any(not self._unused([name]) for name in SWITCHES)
        is_disabled = self._asked is not None and self._is_off
        if is_disabled and not has_switch and not self._unused(["reasoning_effort"]):
            return LEAST_EFFORT
        return asked

    @property
    def is_included(self) -> bool | None:
        """The chat's include_reasoning."""
        return False if self._is_off and self._has_parser else None

    def budget(self, ignored: list[str]) -> int | None:
        """The chat's thinking_token_budget; a budget that has no effect is added to `ignored`."""
        budget = self._asked.budget_tokens if self._asked is not None else None
        if budget is not None and (self._is_off or not self._has_parser):
            ignored.append("thinking.budget_tokens")
            return None
        return budget


def _check_one_of(value: str, known: Sequence[str], name: str) -> None:
    if value not in known:
        raise InvalidRequestError(
            f"{name} must be one of {', '.join(known)}, got {value[:40]}", name
        )
