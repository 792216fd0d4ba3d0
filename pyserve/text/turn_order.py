"""Messages in the order that a chat template demands.

Many templates take a system message at the start alone, or none, and users and assistants only in
turns. Clients know nothing of that: agents put system messages between others, and several of a
user's behind each other. What the template takes as it is stays as it is. Else that alone is
changed which this template never takes, as template_probe.py has found out; so what one request
has in another order the next has too, and the prefix cache knows the prompt that both begin with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyserve.text.template_probe import REASONING, Place

Message = dict[str, Any]  # as chat_messages.py has checked it

BETWEEN = "\n\n"  # two texts that become one
_SYSTEM = ("system", "developer")


def in_order(messages: Sequence[Message], refused: frozenset[Place]) -> tuple[list[Message], str]:
    """The messages, not changed themselves, without what the template refuses; and what was done:
    "system" where system messages became text of users, "turns" where messages were put together or
    in another order.
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
    """Whether a system message stands behind any other."""
    roles = [message["role"] for message in messages]
    first = next((i for i, role in enumerate(roles) if role not in _SYSTEM), len(roles))
    return any(role in _SYSTEM for role in roles[first:])


def has_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(message["role"] in _SYSTEM for message in messages)


def _without_late_system(messages: list[Message], *, has_first: bool) -> list[Message]:
    """System messages as users', but for those at the start, which become one."""
    first = 0
    while has_first and first < len(messages) and messages[first]["role"] in _SYSTEM:
        first += 1
    others = [{**m, "role": "user"} if m["role"] in _SYSTEM else m for m in messages[first:]]
    return [_joined(messages[:first]), *others] if first else others


def _results_first(messages: list[Message]) -> list[Message]:
    """Results directly behind the calls that they answer, in front of what users say there."""
    found: list[Message] = []
    held: list[Message] = []  # since the last assistant's message with calls
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
    """Neighbours with the roles of one of `pairs` are one message, with the role of the first."""
    groups: list[list[Message]] = []
    for message in messages:
        if groups and (groups[-1][0]["role"], message["role"]) in pairs:
            groups[-1].append(message)
        else:
            groups.append([message])
    return list(map(_joined, groups))


def _joined(messages: list[Message]) -> Message:
    """At once: one after the other would copy the text each time."""
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
    """Texts as one text; parts stay parts."""
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) == len(contents):
        return BETWEEN.join(texts)
    return [text for c in contents for text in ([c] if isinstance(c, str) else c)]
