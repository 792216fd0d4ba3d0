"""Brings messages into an order that a chat template accepts.

Many templates accept a system message only at the start, or none at all, and users and assistants
only in turns. Clients do not know this: agents put system messages between others, and several user
messages one after the other. If the template accepts the messages as they are, they stay unchanged.
Otherwise only what this template always refuses is changed, as template_probe.py has found. So a
change made for one request is also made for the next, and the prefix cache finds the prompt that
both begin with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyserve.text.template_probe import REASONING, Place

Message = dict[str, Any]  # as returned by chat_messages._check_message

BETWEEN = "\n\n"  # separates texts that are joined
_SYSTEM = ("system", "developer")


def in_order(messages: Sequence[Message], refused: frozenset[Place]) -> tuple[list[Message], str]:
    """The messages rearranged so that the template does not refuse them, and what was done.

    The messages themselves are not changed. What was done is "system" if system messages became a
    user's, "turns" if messages were joined or reordered, "system, turns" if both, and "" if
    nothing.
    """
    done = []
    ordered = list(messages)
    if refused & {"system", "late system"}:
        ordered = _without_late_system(ordered, has_first="system" not in refused)
        if [m["role"] for m in ordered] != [m["role"] for m in messages]:
            done.append("system")
    before = ordered
    ordered = _results_first(ordered)
    if "user behind result" in refused:
        ordered = _joined_where(ordered, ("tool", "user"))
    if "row" in refused:
        ordered = _joined_where(ordered, ("user", "user"), ("assistant", "assistant"))
    if ordered != before:
        done.append("turns")
    return ordered, ", ".join(done)


def is_late_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a system message comes after any other message."""
    roles = [message["role"] for message in messages]
    first = next((i for i, role in enumerate(roles) if role not in _SYSTEM), len(roles))
    return any(role in _SYSTEM for role in roles[first:])


def has_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(message["role"] in _SYSTEM for message in messages)


def _without_late_system(messages: list[Message], *, has_first: bool) -> list[Message]:
    """Join the system messages at the start into one, if has_first; all others become a user's."""
    first = 0
    while has_first and first < len(messages) and messages[first]["role"] in _SYSTEM:
        first += 1
    others = [{**m, "role": "user"} if m["role"] in _SYSTEM else m for m in messages[first:]]
    return [_joined(messages[:first]), *others] if first else others


def _results_first(messages: list[Message]) -> list[Message]:
    """Move tool results directly behind the calls that they answer, before what users say there."""
    found: list[Message] = []
    # Other messages, held back until the assistant's tool results have come.
    held: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            found += [*held, message]
            held = []
        elif message["role"] == "tool":
            found.append(message)
        elif found and found[-1]["role"] in ("assistant", "tool"):
            held.append(message)
        else:
            found.append(message)
    return found + held


def _joined_where(messages: list[Message], *pairs: tuple[str, str]) -> list[Message]:
    """Join neighbours whose roles are one of `pairs`; the result has the role of the first."""
    groups: list[list[Message]] = []
    for message in messages:
        if groups and (groups[-1][0]["role"], message["role"]) in pairs:
            groups[-1].append(message)
        else:
            groups.append([message])
    return list(map(_joined, groups))


def _joined(messages: list[Message]) -> Message:
    """Several messages as one. All at once: joining them one by one would copy the text
    each time.
    """
    first = messages[0]
    if len(messages) == 1:
        return first
    contents = [message["content"] for message in messages if message["content"]]
    joined = {**first, "content": _contents(contents) if contents else first["content"]}
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if calls:
        joined["tool_calls"] = calls
    for name in REASONING:
        texts = [message[name] for message in messages if message.get(name)]
        if texts:
            joined[name] = BETWEEN.join(texts)
    return joined


def _contents(contents: list[str | list[str]]) -> str | list[str]:
    """Texts are joined into one text; if any content has parts, the result is a list of parts."""
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) == len(contents):
        return BETWEEN.join(texts)
    return [text for c in contents for text in ([c] if isinstance(c, str) else c)]
