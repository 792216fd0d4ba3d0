"""Wire types of tools and tool calls in requests, with OpenAI's names."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_TOOLS = 1024
TOOL_CHOICES = ("none", "auto", "required")
ALLOWED_MODES = ("auto", "required")
MAX_TOOL_CALLS = 4096  # in all messages of a request together
MAX_TOOL_NAME_CHARS = 256
MAX_SCHEMA_NESTING = 64  # depth of lists and objects in a tool's parameters


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: Function | None = None


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits the model to some of the request's tools.

    Each entry of `tools` needs only the name of a tool. `mode` "required" makes the model call at
    least one of them, "auto" leaves that to the model.
    """

    mode: str
    tools: list[Tool]


class ToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str | dict[str, Any] | None = None


class MessageCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool call in a message of the assistant, which the client got and sends back."""

    function: FunctionCall
    id: str | None = None
    type: str | None = None
    index: int | None = None


# The types that clients send, for /openapi.json.
SENT = (Function, Tool, NamedFunction, AllowedTools, ToolChoice, FunctionCall, MessageCall)
