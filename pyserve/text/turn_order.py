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
    found: list[Message] = []
    for message in messages:
        is_system = message["role"] in _SYSTEM
        if is_system and has_first and all(m["role"] in _SYSTEM for m in found):
            found = [_joined(found[0], message)] if found else [message]
        else:
            found.append({**message, "role": "user"} if is_system else message)
    return found


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
    found: list[Message] = []
    for message in messages:
        if found and (found[-1]["role"], message["role"]) in pairs:
            found[-1] = _joined(found[-1], message)
        else:
            found.append(message)
    return found


def _joined(first: Message, second: Message) -> Message:
    joined = {**second, **first, "content": _contents(first["content"], second["content"])}
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    if calls:
        joined["tool_calls"] = calls
    for name in REASONING:
        if name in first and name in second:
            joined[name] = first[name] + BETWEEN + second[name]
    return joined


def _contents(first: str | list[str] | None, second: str | list[str] | None) -> Any:
    if not first or not second:
        return first or second
    if isinstance(first, str) and isinstance(second, str):
        return first + BETWEEN + second
    return [*([first] if isinstance(first, str) else first),
            *([second] if isinstance(second, str) else second)]  # fmt: skip
