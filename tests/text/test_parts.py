"""What stands behind the stop strings: text in, parts out."""

from __future__ import annotations

from collections.abc import Sequence

from pyserve.text.parts import (
    Chain,
    Content,
    Part,
    Plain,
    Reasoning,
    ToolCall,
    content_of,
    num_chars,
    reasoning_of,
    tool_calls_of,
)

CALLS: list[Part] = [
    Reasoning("So "), Content("Now"), ToolCall(0, "a", "f", "{"), ToolCall(0, arguments='"x":1}'),
    ToolCall(1, "b", "g"), Reasoning("on"), ToolCall(1, arguments="{}"), Content("."),
]  # fmt: skip


def test_plain_text_is_content_as_it_comes() -> None:
    stage = Plain()
    parts = [*stage.push(Content("Hello")), *stage.push(Content(" world")), *stage.flush()]
    assert parts == [Content("Hello"), Content(" world")]
    assert content_of(parts) == "Hello world"


class UpToDot:
    """Text up to the first dot is reasoning; the last character of a push waits."""

    def __init__(self) -> None:
        self._held = ""
        self._has_ended = False

    def push(self, content: Content) -> Sequence[Part]:
        text = self._held + content.text
        if self._has_ended:
            return [content]
        before, dot, behind = text.partition(".")
        if dot:
            self._has_ended, self._held = True, ""
            return [Reasoning(before), Content(behind)] if behind else [Reasoning(before)]
        self._held = text[-1:]
        return [Reasoning(text[:-1])]

    def flush(self) -> Sequence[Part]:
        return [] if self._has_ended else [Content(self._held)]


class Shout:
    """Holds everything until the end."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, content: Content) -> Sequence[Part]:
        self._held += content.text
        return []

    def flush(self) -> Sequence[Part]:
        return [Content(self._held.upper())]


def test_the_second_stage_gets_what_the_first_takes_for_content() -> None:
    chain = Chain(UpToDot(), Shout())
    parts = [*chain.push(Content("a.b")), *chain.push(Content("c")), *chain.flush()]
    assert parts == [Reasoning("a"), Content("BC")]
    chain = Chain(UpToDot(), Shout())  # what the first still holds goes through the second
    assert [*chain.push(Content("ab")), *chain.flush()] == [Reasoning("a"), Content("B")]


def test_whole_answers_gather_the_parts() -> None:
    assert content_of(CALLS) == "Now."
    assert reasoning_of(CALLS) == "So on"
    assert tool_calls_of(CALLS) == [ToolCall(0, "a", "f", '{"x":1}'), ToolCall(1, "b", "g", "{}")]
    assert num_chars(CALLS) == len("Now.") + len("So on") + len('{"x":1}') + len("{}")
