"""Parts: what an answer is made of, once stop strings have settled its text.

A stage takes the text of one answer as it comes and says what it is. `Plain` says that all of it is
content. A parser of reasoning or of tool calls is another stage, in a file of its own here: `push`
may hold text back until it knows what it is, and `flush` gives what is held when the text has
ended. Thinking comes first (reasoning.py); what it leaves as content goes to the stage of the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, Protocol

import msgspec


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer.

    tokens  what is known of the tokens that the text was made from, such as their logprobs, in
            their order. A stage that holds text back or drops a marker passes them on with what it
            gives next, be that without text: each token of an answer comes once.
    """

    text: str
    tokens: tuple[Any, ...] = ()


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text of the thinking that comes before an answer. `tokens` as those of Content."""

    text: str
    tokens: tuple[Any, ...] = ()


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A piece of the call of a tool.

    index      of the call in its answer, from 0; the pieces of one call follow each other.
    id, name   of the call and of its tool: in the first piece of a call, None in others.
    arguments  the next characters of the JSON text of its arguments.
    tokens     as those of Content.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    tokens: tuple[Any, ...] = ()


Part = Content | Reasoning | ToolCall


class Stage(Protocol):
    """Of one answer. What comes in is content still to be looked at, in order."""

    def push(self, content: Content) -> Sequence[Part]: ...

    def flush(self) -> Sequence[Part]: ...


class Plain:
    """Everything is content."""

    def push(self, content: Content) -> Sequence[Part]:
        return (content,)

    def flush(self) -> Sequence[Part]:
        return ()


def pass_on(parts: Sequence[Part], stage: Stage) -> list[Part]:
    """What another stage has found, its content as `stage` sees it."""
    passed: list[Part] = []
    for part in parts:
        if isinstance(part, Content):
            passed += stage.push(part)
        else:
            passed.append(part)
    return passed


def joined(parts: Sequence[Part]) -> list[Part]:
    """The same parts, with those of one kind, or one call, that follow each other in one part."""
    found: list[Part] = []
    for _, group in groupby(parts, lambda p: (type(p), p.index if isinstance(p, ToolCall) else 0)):
        alike = list(group)
        first = alike[0]
        if len(alike) > 1:
            # At once: one after the other would copy the text each time.
            tokens = tuple(chain.from_iterable(part.tokens for part in alike))
            texts = [part.arguments if isinstance(part, ToolCall) else part.text for part in alike]
            name = "arguments" if isinstance(first, ToolCall) else "text"
            first = msgspec.structs.replace(first, tokens=tokens, **{name: "".join(texts)})
        found.append(first)
    return found


def content_of(parts: Sequence[Part]) -> str:
    """The text of a whole answer."""
    return "".join([part.text for part in parts if isinstance(part, Content)])


def reasoning_of(parts: Sequence[Part]) -> str:
    """The text of the thinking of a whole answer."""
    return "".join([part.text for part in parts if isinstance(part, Reasoning)])


def tool_calls_of(parts: Sequence[Part]) -> list[ToolCall]:
    """The calls of a whole answer, the pieces of each put together."""
    calls: list[ToolCall] = []
    arguments: list[list[str]] = []
    for part in parts:
        if not isinstance(part, ToolCall):
            continue
        if part.index == len(calls):
            calls.append(part)
            arguments.append([])
        arguments[part.index].append(part.arguments)
    return [
        msgspec.structs.replace(call, arguments="".join(texts))
        for call, texts in zip(calls, arguments, strict=True)
    ]


def num_chars(parts: Sequence[Part]) -> int:
    """Characters of all texts of `parts`."""
    return sum(len(p.arguments if isinstance(p, ToolCall) else p.text) for p in parts)
