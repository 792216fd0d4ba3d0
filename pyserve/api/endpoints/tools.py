"""The tools of a request: what the prompt shows of them, and how calls in the answer are parsed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import msgspec

from pyserve.api.generation.job import Job
from pyserve.api.wire.protocol import ChatRequest, Message, TokenizeRequest
from pyserve.api.wire.tools import (
    ALLOWED_MODES,
    MAX_TOOL_CALLS,
    MAX_TOOL_NAME_CHARS,
    MAX_TOOLS,
    TOOL_CHOICES,
    MessageCall,
    Tool,
    ToolChoice,
)
from pyserve.errors import InvalidRequestError
from pyserve.text.tool_parsers.registry import ToolFormat
from pyserve.text.tool_parsers.stage import MAX_CALLS, Tools

_NAME = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_TOOL_NAME_CHARS}}}")
_NEEDS_AUTO = (
    '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
)
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The checked tools of a request, and how they may be called.

    shown      the tools as the chat template gets them; empty: the prompt shows none.
    places     name of a tool -> its index in the request's `tools`.
    mode       from tool_choice: "required" if the answer must be a call, "auto" if it may be one,
               "none" if text that looks like a call is ordinary text.
    name       the only tool that may be called; "": any.
    max_calls  calls beyond this number are dropped from the answer.
    strict     names of the tools whose arguments must match their schemas.
    format     the format in which calls are written; None: the answer is not searched for calls.
    trigger    see text.tool_parsers.stage.Tools.
    ignored    names of fields that have no effect.
    """

    shown: list[dict[str, Any]] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    mode: Literal["none", "auto", "required"] = "none"
    name: str = ""
    max_calls: int = MAX_CALLS
    strict: frozenset[str] = frozenset()
    format: ToolFormat | None = None
    trigger: str | None = None
    ignored: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Tool name -> JSON schema of its arguments."""
        functions = [tool["function"] for tool in self.shown]
        return {function["name"]: function["parameters"] for function in functions}

    def apply(self, job: Job) -> Job:
        """`job` with its answers parsed for tool calls."""
        if self.format is None:
            return job
        tools = Tools(self.parameters, self.max_calls, trigger=self.trigger)
        ending = job.ending
        if self.name:  # OpenAI and vLLM report "stop" if the client has named the tool
            ending = replace(ending, call_reason="stop")
        make_stage = partial(self.format.stage, tools)
        return msgspec.structs.replace(job, make_stage=make_stage, ending=ending)


def read_tools(body: ChatRequest | TokenizeRequest) -> ToolUse:
    """Check the tool fields of a request, without regard to what the server was started with.

    Raises InvalidRequestError naming the field.
    """
    tools = body.tools or []
    shown = _check_tools(tools)
    places = {tool["function"]["name"]: i for i, tool in enumerate(shown)}
    choice = body.tool_choice
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        shown, choice = _allowed(choice, shown)
    is_alone = isinstance(body, ChatRequest) and body.parallel_tool_calls is False
    if isinstance(choice, ToolChoice):
        name = _check_named(choice, shown)
    elif choice not in (None, *TOOL_CHOICES):
        raise InvalidRequestError(
            f"tool_choice must be one of {', '.join(TOOL_CHOICES)} or name a function, "
            f"got {str(choice)[:40]}",
            "tool_choice",
        )
    else:
        name = ""
    if not tools or choice == "none":
        if choice == "required":
            raise InvalidRequestError("tool_choice: required needs tools", "tool_choice")
        without_effect = {
            "tools": bool(tools),
            "tool_choice": choice == "auto",
            "parallel_tool_calls": is_alone,
        }
        return ToolUse(ignored=[field for field, is_so in without_effect.items() if is_so])
    return ToolUse(
        shown=shown,
        places=places,
        mode="required" if name or choice == "required" else "auto",
        name=name,
        max_calls=1 if is_alone or name else MAX_CALLS,
        strict=frozenset(
            tool.function.name for tool in tools if tool.function and tool.function.strict
        ),
    )


def with_parser(use: ToolUse, format: ToolFormat | None, *, has_auto: bool) -> ToolUse:
    """Add the server's tool format, and check that the server allows the request's mode.

    has_auto  the server was started with --enable-auto-tool-choice.

    Raises InvalidRequestError if optional calls are requested and the server does not parse them.
    """
    if use.mode == "auto" and not (format and has_auto):
        raise InvalidRequestError(_NEEDS_AUTO, "tool_choice")
    return use if use.mode == "none" else replace(use, format=format)


def _check_tools(tools: Sequence[Tool], param: str = "tools") -> list[dict[str, Any]]:
    """Check tools; returns them as templates get them.

    Absent fields are left out, and the keys are in the order that models were trained on. `param`
    is the field that errors name. Raises InvalidRequestError.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"{param} has {len(tools)} entries, the limit is {MAX_TOOLS}", param
        )
    shown: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        path = f"{param}[{i}]"
        if tool.type != "function":
            raise InvalidRequestError(
                f"{path}.type must be function, got {tool.type[:40]}", f"{path}.type"
            )
        function = tool.function
        if function is None:
            raise InvalidRequestError(f"{path}.function is missing", f"{path}.function")
        name = function.name
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"{path}.function.name must be 1 to {MAX_TOOL_NAME_CHARS} letters, digits or "
                f"_ . : / -, got {name[:40]!r}",
                f"{path}.function.name",
            )
        if name in shown:
            raise InvalidRequestError(
                f"{path}.function.name: two tools are called {name[:80]}", f"{path}.function.name"
            )
        description = function.description
        parameters = _NO_PARAMETERS if function.parameters is None else function.parameters
        shown[name] = {
            "type": "function",
            "function": {
                "name": name,
                **({} if description is None else {"description": description}),
                "parameters": parameters,
            },
        }
    return list(shown.values())


def _allowed(
    choice: ToolChoice, shown: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], str]:
    """The tools that `allowed_tools` names, and its mode. The prompt does not show the others.

    Raises InvalidRequestError.
    """
    path = "tool_choice.allowed_tools"
    if choice.allowed_tools is None:
        raise InvalidRequestError(f"{path} is missing", path)
    mode, tools = choice.allowed_tools.mode, choice.allowed_tools.tools
    if mode not in ALLOWED_MODES:
        raise InvalidRequestError(
            f"{path}.mode must be {' or '.join(ALLOWED_MODES)}, got {mode[:40]}", f"{path}.mode"
        )
    if not tools:
        raise InvalidRequestError(f"{path}.tools must hold at least 1 tool, got 0", f"{path}.tools")
    names = {tool["function"]["name"] for tool in _check_tools(tools, f"{path}.tools")}
    kept = [tool for tool in shown if tool["function"]["name"] in names]
    missing = names - {tool["function"]["name"] for tool in kept}
    if missing:
        raise InvalidRequestError(
            f"{path}.tools: no tool is called {min(missing)[:80]}", f"{path}.tools"
        )
    return kept, mode


def _check_named(choice: ToolChoice, shown: Sequence[dict[str, Any]]) -> str:
    """The name of the function that `choice` requires. Raises InvalidRequestError."""
    if choice.type != "function":
        raise InvalidRequestError(
            f"tool_choice.type must be function or allowed_tools, got {choice.type[:40]}",
            "tool_choice.type",
        )
    if choice.function is None:
        raise InvalidRequestError("tool_choice.function is missing", "tool_choice.function")
    name = choice.function.name
    if not shown:
        raise InvalidRequestError("tool_choice: a named tool needs tools", "tool_choice")
    if all(tool["function"]["name"] != name for tool in shown):
        raise InvalidRequestError(
            f"tool_choice.function.name: no tool is called {name[:80]}", "tool_choice.function.name"
        )
    return name


def check_calls(messages: Sequence[Message]) -> None:
    """Raise InvalidRequestError for too many calls, calls that are not the assistant's, and calls
    of a type other than function."""
    num_calls = sum(len(message.tool_calls or ()) for message in messages)
    if num_calls > MAX_TOOL_CALLS:
        raise InvalidRequestError(
            f"messages hold {num_calls} tool calls in all, the limit is {MAX_TOOL_CALLS}",
            "messages",
        )
    for i, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            path = f"messages[{i}].tool_calls"
            raise InvalidRequestError(f"{path}: only the assistant calls tools", path)
        for j, call in enumerate(message.tool_calls or ()):
            if call.type not in (None, "function"):
                path = f"messages[{i}].tool_calls[{j}].type"
                raise InvalidRequestError(f"{path} must be function, got {call.type[:40]}", path)


def plain_calls(message: Message, format: ToolFormat | None) -> dict[str, Any]:
    """The keys of a template's message for its tool calls, or for the call that it answers.

    text/chat_messages.py later brings the arguments into the form that the template wants.
    """

    def fitted(call_id: str) -> str:
        return call_id if format is None else format.fitted_id(call_id)

    def plain(call: MessageCall) -> dict[str, Any]:
        function = {"name": call.function.name, "arguments": call.function.arguments}
        ids = {} if call.id is None else {"id": fitted(call.id)}
        return {**ids, "type": "function", "function": function}

    shown: dict[str, Any] = {}
    if message.tool_calls:
        shown["tool_calls"] = list(map(plain, message.tool_calls))
    if message.role == "tool" and message.tool_call_id is not None:
        shown["tool_call_id"] = fitted(message.tool_call_id)
    return shown


def arguments_in(messages: Sequence[Message]) -> list[Any]:
    """The ids, names and arguments of all calls in messages, for measuring their size."""
    return [
        [call.id or "", call.function.name, call.function.arguments or ""]
        for message in messages
        for call in message.tool_calls or ()
    ]
