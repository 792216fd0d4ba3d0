"""OpenAI's old function-calling fields, translated into the fields of tools.

A request's `functions` and `function_call`, a message's `function_call` and the role "function"
mean the same as `tools`, `tool_choice`, `tool_calls` and the role "tool", with one call at a time.
Requests are translated here; chat.py writes the answers with the old fields.
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
    """A chat request that uses only the fields of tools.

    renamed   turns names of its fields into those that the client used.
    ignored   names of the client's fields that have no effect.
    is_asked  the answer reports a call as `function_call` instead of `tool_calls`.
    """

    body: ChatRequest
    renamed: Renamed
    ignored: list[str]
    is_asked: bool = False


def with_tools(body: ChatRequest) -> Translated:
    """Translate all old fields of `body`. Raises InvalidRequestError naming the field."""
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
    """Translate the old fields of the messages; returns the indices of the translated messages.

    Raises InvalidRequestError naming the field.
    """
    messages = body.messages or []
    places = frozenset(
        i for i, m in enumerate(messages) if m.function_call is not None or m.role == "function"
    )
    if not places:
        return body, places
    translated = list(messages)
    ids: dict[str, str] = {}  # name of a function -> id made for its latest call
    for i in sorted(places):
        translated[i] = _with_tools(messages[i], i, ids)
    return msgspec.structs.replace(body, messages=translated), places


def _with_tools(message: Message, index: int, ids: dict[str, str]) -> Message:
    """Translate message number `index`, which has an old field; adds the id of its call to `ids`.

    Raises InvalidRequestError naming the field.
    """
    path = f"messages[{index}]"
    call = message.function_call
    if call is not None:
        if message.tool_calls:
            raise InvalidRequestError(
                f"{path}.function_call and {path}.tool_calls say the same: leave function_call out",
                f"{path}.function_call",
            )
        call_id = ids[call.name] = f"call_{len(ids)}_{index}"
        return msgspec.structs.replace(
            message, function_call=None, tool_calls=[MessageCall(call, call_id, "function")]
        )
    if not message.name:
        raise InvalidRequestError(
            f"{path}.name is missing: the function whose result this is", f"{path}.name"
        )
    answered = message.tool_call_id or ids.get(message.name)
    # The id now says which call this message answers, so that the name is no longer needed.
    name = message.name if answered is None else None
    return msgspec.structs.replace(message, role="tool", name=name, tool_call_id=answered)


def _check_choice(choice: str | None) -> None:
    if choice not in (None, *CHOICES):
        raise InvalidRequestError(
            f"function_call must be one of {', '.join(CHOICES)} or name a function, "
            f"got {choice[:40]}",
            "function_call",
        )


def renamed(places: frozenset[int], *, is_asked: bool = False) -> Renamed:
    """Rules that turn the names of tool fields back into those of the old fields.

    places    indices of the messages that were translated.
    is_asked  the fields of the request were translated too.
    """

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
