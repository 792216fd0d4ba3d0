"""Functions of a chat, OpenAI's words for tools before there were tools.

`functions` and `function_call` of a request, `function_call` of a message and the role function say
what tools, tool_choice, tool_calls and the role tool say, of one call at a time. They are
translated into these; chat.py writes the answer in the words that the client knows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from pyserve.api.endpoints.renamed import Renamed
from pyserve.api.wire.protocol import ChatRequest, Message, TokenizeRequest
from pyserve.api.wire.tools import MessageCall, NamedFunction, Tool, ToolChoice
from pyserve.errors import InvalidRequestError

T = TypeVar("T", ChatRequest, TokenizeRequest)
CHOICES = ("none", "auto")


@dataclass(frozen=True, slots=True)
class Translated:
    """A chat in the words of tools.

    renamed   names of its fields as the client has them.
    ignored   fields of the client that have no effect.
    is_asked  its answer calls a function and not a tool.
    """

    body: ChatRequest
    renamed: Renamed
    ignored: list[str]
    is_asked: bool = False


def with_tools(body: ChatRequest) -> Translated:
    """`body` without functions. Raises InvalidRequestError naming the field."""
    body, places = with_tool_messages(body)
    choice, ignored = body.function_call, []
    if not body.functions:
        if isinstance(choice, NamedFunction):
            raise InvalidRequestError(
                "function_call: a named function needs functions", "function_call"
            )
        _check_choice(choice)
        if choice == "auto":
            ignored.append("function_call")
        return Translated(body, renamed(places), ignored)
    for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(body, old) and getattr(body, new):
            raise InvalidRequestError(f"{old} and {new} say the same: leave {old} out", old)
    if not isinstance(choice, NamedFunction):
        _check_choice(choice)
    if body.parallel_tool_calls is not None:
        ignored.append("parallel_tool_calls")
    asked = msgspec.structs.replace(
        body,
        functions=None,
        function_call=None,
        tools=[Tool("function", function) for function in body.functions],
        tool_choice=ToolChoice("function", choice) if isinstance(choice, NamedFunction) else choice,
        parallel_tool_calls=None if choice == "none" else False,
    )
    return Translated(asked, renamed(places, is_asked=True), ignored, is_asked=choice != "none")


def with_tool_messages(body: T) -> tuple[T, frozenset[int]]:
    """`body` with the words of tools in its messages, and the places of those that had others."""
    messages = body.messages or []
    places = frozenset(
        i for i, m in enumerate(messages) if m.function_call is not None or m.role == "function"
    )
    if not places:
        return body, places
    translated = list(messages)
    ids: dict[str, str] = {}  # of the last call of each function
    for i in sorted(places):
        translated[i] = _with_tools(messages[i], f"messages[{i}]", ids)
    return msgspec.structs.replace(body, messages=translated), places


def _with_tools(message: Message, path: str, ids: dict[str, str]) -> Message:
    call = message.function_call
    if call is not None:
        if message.tool_calls:
            raise InvalidRequestError(
                f"{path}.function_call and {path}.tool_calls say the same: leave function_call out",
                f"{path}.function_call",
            )
        call_id = ids[call.name] = f"call_{len(ids)}_{path[9:-1]}"
        return msgspec.structs.replace(
            message, function_call=None, tool_calls=[MessageCall(call, call_id, "function")]
        )
    if not message.name:
        raise InvalidRequestError(
            f"{path}.name is missing: the function whose result this is", f"{path}.name"
        )
    answered = message.tool_call_id or ids.get(message.name)
    name = message.name if answered is None else None  # it has said which call this answers
    return msgspec.structs.replace(message, role="tool", name=name, tool_call_id=answered)


def _check_choice(choice: str | None) -> None:
    if choice not in (None, *CHOICES):
        raise InvalidRequestError(
            f"function_call must be one of {', '.join(CHOICES)} or name a function, "
            f"got {choice[:40]}",
            "function_call",
        )


def renamed(places: frozenset[int], *, is_asked: bool = False) -> Renamed:
    """The names of a chat's fields where functions were asked for, or stood in these messages."""

    def of_message(found: re.Match[str]) -> str:
        return f"messages[{found[1]}].function_call" if int(found[1]) in places else found[0]

    of_request = (
        (r"tools\[(\d+)\](?:\.function)?", r"functions[\1]"),
        (r"tool_choice\.function\.name", "function_call.name"),
        (r"tool_choice", "function_call"),
        (r"parallel_tool_calls|\btools\b", "functions"),
    )
    of_messages = ((r"messages\[(\d+)\]\.tool_calls(?:\[0\](?:\.function)?)?", of_message),)
    return Renamed([*of_messages, *(of_request if is_asked else ())])
