"""Parts: what an answer is made of, once stop strings have settled its text.

A stage takes the text of one answer as it comes and says what it is. `Plain` says that all of it is
content. A parser of reasoning or of tool calls is another stage, in a file of its own here, and its
part types join `Part`: `push` may hold text back until it knows what it is, and `flush` gives what
is held when the text has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec


class Content(msgspec.Struct, frozen=True, gc=False):
    """Text of the answer. What is known of its tokens, such as their logprobs, belongs here."""

    text: str


Part = Content


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


def content_of(parts: Sequence[Part]) -> str:
    """The text of a whole answer."""
    return "".join([part.text for part in parts])
