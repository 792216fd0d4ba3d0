"""Tools of the Responses API -> functions of a chat, and the names to translate the calls back.

A chat knows only functions. A tool of a namespace becomes a function whose name begins with the
namespace. A custom tool, which takes plain text, becomes a function with that text as its only
argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import msgspec

from pyserve.api.endpoints.body import wrong_type
from pyserve.api.endpoints.responses_items import flat_name
from pyserve.api.wire.lenient import MAX_NAME_CHARS, Names
from pyserve.api.wire.responses import (
    ChosenTool,
    CustomTool,
    FunctionTool,
    NamespaceTool,
    Object,
)
from pyserve.api.wire.tools import MAX_TOOLS, Function, NamedFunction, Tool, ToolChoice
from pyserve.errors import InvalidRequestError

# JSON schema of the arguments of a custom tool.
PLAIN_TEXT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
CHOICES = ("function", "custom", "allowed_tools")
_FIELDS = {
    "function": frozenset(FunctionTool.__struct_fields__),
    "custom": frozenset(CustomTool.__struct_fields__) - {"format"},
    "namespace": frozenset(NamespaceTool.__struct_fields__),
}

T = TypeVar("T")


class ToolName(NamedTuple):
    """A tool as the client named it. is_custom: it takes plain text instead of JSON arguments."""

    name: str
    namespace: str | None
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class OwnTools:
    """The tools of a request, translated for a chat.

    tools   the functions of the chat.
    paths   for each of them its place in the request: "tools[3]", or "tools[3].tools[0]".
    names   the function's name in the chat -> the tool as the client named it.
    choice  the tool_choice of the chat.
    """

    tools: list[Tool] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    names: Mapping[str, ToolName] = field(default_factory=dict)
    choice: str | ToolChoice | None = None


def read_own_tools(
    tools: Sequence[Object], choice: str | ChosenTool | None, unknown: Names
) -> OwnTools:
    """Translate the tools and the tool_choice of a request.

    unknown  collects the names of ignored fields and of ignored kinds of tools.

    Raises InvalidRequestError naming the field.
    """
    _check_number(len(tools))
    found, paths, names = [], [], {}
    for path, namespace, tool in _functions(tools, unknown):
        is_custom = isinstance(tool, CustomTool)
        flat = flat_name(namespace, tool.name)
        if isinstance(tool, CustomTool):
            function = Function(flat, tool.description, PLAIN_TEXT)
        else:
            function = Function(flat, tool.description, tool.parameters, tool.strict)
        found.append(Tool("function", function))
        paths.append(path)
        names[flat] = ToolName(tool.name, namespace, is_custom)
        _check_number(len(found))
    own = OwnTools(found, paths, names)
    if not isinstance(choice, ChosenTool):
        return replace(own, choice=choice)
    if choice.type == "allowed_tools":
        return _allowed(own, choice, unknown)
    if choice.type not in CHOICES:
        raise InvalidRequestError(
            f"tool_choice.type must be one of {', '.join(CHOICES)}, got {choice.type[:40]}",
            "tool_choice.type",
        )
    if choice.name is None:
        raise InvalidRequestError("tool_choice.name is missing", "tool_choice.name")
    name = NamedFunction(flat_name(choice.namespace, choice.name))
    return replace(own, choice=ToolChoice("function", name))


def _functions(
    tools: Sequence[Object], unknown: Names, path: str = "tools", namespace: str | None = None
) -> list[tuple[str, str | None, FunctionTool | CustomTool]]:
    """The function and custom tools in `tools`, each as (path, namespace, tool).

    Namespaces are flattened. Tools of other kinds, and namespaces inside a namespace, are ignored
    and added to `unknown`.
    """
    found: list[tuple[str, str | None, FunctionTool | CustomTool]] = []
    for i, tool in enumerate(tools):
        own_path = f"{path}[{i}]"
        kind = tool.get("type")
        if not isinstance(kind, str):
            raise InvalidRequestError(f"{own_path}.type must be a string", f"{own_path}.type")
        if kind not in _FIELDS or (kind == "namespace" and namespace is not None):
            unknown.add(f"tools.{kind[:MAX_NAME_CHARS]}")
            continue
        for name, value in tool.items():
            if name not in _FIELDS[kind] and value is not None:
                unknown.add(f"tools.{name[:MAX_NAME_CHARS]}")
        if kind == "namespace":
            outer = _convert(tool, NamespaceTool, own_path)
            found += _functions(outer.tools, unknown, f"{own_path}.tools", outer.name)
        elif kind == "custom":
            found.append((own_path, namespace, _convert(tool, CustomTool, own_path)))
        else:
            found.append((own_path, namespace, _convert(tool, FunctionTool, own_path)))
    return found


def _allowed(own: OwnTools, choice: ChosenTool, unknown: Names) -> OwnTools:
    """Keep only the tools that tool_choice allows, so the prompt does not show the others."""
    path = "tool_choice.tools"
    if choice.mode not in (None, "auto", "required"):
        raise InvalidRequestError(
            f"tool_choice.mode must be auto or required, got {choice.mode[:40]}", "tool_choice.mode"
        )
    _check_number(len(choice.tools or ()), path)
    allowed: set[str] = set()
    for i, tool in enumerate(choice.tools or ()):
        kind, name, namespace = (tool.get(key) for key in ("type", "name", "namespace"))
        if not isinstance(kind, str) or kind not in _FIELDS:
            unknown.add(f"{path}.{str(kind)[:MAX_NAME_CHARS]}")
            continue
        if kind == "namespace":
            flat = {f for f, known in own.names.items() if known.namespace == name}
        else:
            flat = {flat_name(namespace, str(name))} & own.names.keys()
        if not flat:
            raise InvalidRequestError(
                f"{path}[{i}].name: no tool is called {str(name)[:80]}", f"{path}[{i}].name"
            )
        allowed |= flat
    flats = [tool.function.name for tool in own.tools if tool.function is not None]
    kept = [i for i, flat in enumerate(flats) if flat in allowed]
    return OwnTools(
        [own.tools[i] for i in kept], [own.paths[i] for i in kept], own.names, choice.mode or "auto"
    )


def _check_number(number: int, name: str = "tools") -> None:
    if number > MAX_TOOLS:
        raise InvalidRequestError(f"{name} has {number} entries, the limit is {MAX_TOOLS}", name)


def _convert(tool: Object, kind: type[T], path: str) -> T:
    try:
        return msgspec.convert(tool, kind)
    except msgspec.ValidationError as error:
        raise wrong_type(error, path) from None
