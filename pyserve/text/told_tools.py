"""Tools for a model whose chat template does not show them: tools, calls and results as text.

Many chat templates are older than tool calls, such as that of Mistral-7B-Instruct-v0.2. For these
the functions, and the form in which the server recognises calls, are described in the system
message or in the first user message. Whether the model follows is up to the model, but a grammar
can hold it to the form (tool_parsers/tags.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pyserve.text.tool_parsers.written import Written

Message = dict[str, Any]
Content = str | list[Any] | None

FUNCTIONS = "You can call these functions:"
FORM = "To call one, write only this, with its name and arguments:"
WHEN = "Else answer in words."


def in_words(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    written: Written,
    *,
    has_system: bool,
) -> list[Message]:
    """The messages with everything as text that a template without tools would leave out.

    messages    as a chat template gets them; they are not changed.
    tools       as a chat template gets them; at least one.
    written     how the model is to write calls.
    has_system  whether the template shows messages of the role system.
    """
    told = calls_in_words(messages, written)
    functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    example = written.text([("FUNCTION", '{"PARAMETER": "VALUE"}')])
    text = "\n".join([FUNCTIONS, *functions, FORM, example, WHEN])
    at = next((i for i, message in enumerate(told) if message["role"] == "user"), 0)
    if told and told[0]["role"] in ("system", "developer"):
        told[0] = {**told[0], "content": _joined(told[0]["content"], text)}
    elif has_system or not told or told[at]["role"] != "user":
        told.insert(0, {"role": "system" if has_system else "user", "content": text})
    else:
        told[at] = {**told[at], "content": _joined(text, told[at]["content"])}
    return told


def calls_in_words(messages: Sequence[Message], written: Written) -> list[Message]:
    """The messages with tool calls as the text that the model wrote, and results as user messages.

    Some templates require users and assistants to take turns. So the results of several calls
    become one message, together with what the user says after them.
    """
    told: list[Message] = []
    names: dict[str, str] = {}  # id of a call -> name of its function
    is_result = False
    for message in messages:
        calls = message.get("tool_calls", ())
        names |= {call.get("id", ""): call["function"]["name"] for call in calls}
        was_result, is_result = is_result, message["role"] == "tool"
        if calls:
            text = written.text([_name_and_arguments(call["function"]) for call in calls])
            kept = {name: value for name, value in message.items() if name != "tool_calls"}
            message = {**kept, "content": _joined(message["content"], text)}
        elif is_result:
            name = names.get(message.get("tool_call_id", ""), message.get("name", ""))
            head = f"Result of {name}:" if name else "Result:"
            message = {"role": "user", "content": _joined(head, message["content"], "\n")}
        if was_result and message["role"] == "user":
            before = told.pop()["content"]
            message = {**message, "content": _joined(before, message["content"])}
        told.append(message)
    return told


def _name_and_arguments(function: Mapping[str, Any]) -> tuple[str, str]:
    given = function.get("arguments") or {}
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return function["name"], text


def _joined(first: Content, second: Content, between: str = "\n\n") -> Content:
    """Two contents as one; the result has parts if either of them has."""
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return first + between + second
    return [*_parts(first), *_parts(second)]


def _parts(content: str | list[Any]) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
