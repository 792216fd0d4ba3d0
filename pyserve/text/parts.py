"""Parts: what the text of an answer consists of, once stop strings have been looked for in it.

A stage gets the text of one answer as it is generated and returns it as parts. `Plain` returns
everything as content. A parser of reasoning or of tool calls is another stage, in a file of its
own: `push` may hold back text until its kind is known, and `flush` returns what is held back at the
end of the text. Reasoning comes first (reasoning.py); what it returns as content goes to the next
stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, Protocol

import msgspec


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer.

    tokens  what is known of the tokens that made the text, such as their logprobs, in order. A
            stage that holds text back, or drops a marker, adds their entries to the next part that
            it returns, even one without text, so that each token of an answer comes exactly once.
    """

    text: str
    tokens: tuple[Any, ...] = ()


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """Text of the thinking before an answer. `tokens` is as in Content."""

    text: str
    tokens: tuple[Any, ...] = ()


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A piece of a tool call.

    index      index of the call in its answer, from 0; the pieces of one call follow each other.
    id, name   of the call and of its tool, in the first piece of the call; None in the others.
    arguments  the next characters of the JSON text of its arguments.
    tokens     as in Content.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    tokens: tuple[Any, ...] = ()


Part = Content | Reasoning | ToolCall


class Stage(Protocol):
    """Sorts the text of one answer into parts. It gets the content that has not been sorted, in
    order.
    """

    def push(self, content: Content) -> Sequence[Part]: ...

    def flush(self) -> Sequence[Part]: ...


class Plain:
    """A stage for which everything is content."""

    def push(self, content: Content) -> Sequence[Part]:
        return (content,)

    def flush(self) -> Sequence[Part]:
        return ()


def pass_on(parts: Sequence[Part], stage: Stage) -> list[Part]:
    """The parts that another stage has returned, with their content passed through `stage`."""
    passed: list[Part] = []
    for part in parts:
        if isinstance(part, Content):
            passed += stage.push(part)
        else:
            passed.append(part)
    return passed


def joined(parts: Sequence[Part]) -> list[Part]:
    """The same parts, with neighbours joined if they are of the same kind, or of the same tool
    call.
    """
    found: list[Part] = []
    for _, group in groupby(parts, lambda p: (type(p), p.index if isinstance(p, ToolCall) else 0)):
        alike = list(group)
        first = alike[0]
        if len(alike) > 1:
            # All at once: joining them one by one would copy the text each time.
            tokens = tuple(chain.from_iterable(part.tokens for part in alike))
            texts = [part.arguments if isinstance(part, ToolCall) else part.text for part in alike]
            name = "arguments" if isinstance(first, ToolCall) else "text"
            first = msgspec.structs.replace(first, tokens=tokens, **{name: "".join(texts)})
        found.append(first)
    return found


def content_of(parts: Sequence[Part]) -> str:
    """The content of a whole answer as one text."""
    return "".join([part.text for part in parts if isinstance(part, Content)])


def reasoning_of(parts: Sequence[Part]) -> str:
    """The thinking of a whole answer as one text."""
    return "".join([part.text for part in parts if isinstance(part, Reasoning)])


def tool_calls_of(parts: Sequence[Part]) -> list[ToolCall]:
    """The tool calls of a whole answer, each with its pieces joined."""
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
    """Number of characters in all texts and arguments of `parts`."""
    return sum(len(p.arguments if isinstance(p, ToolCall) else p.text) for p in parts)
