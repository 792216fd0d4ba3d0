"""What stands behind the stop strings: text in, parts out."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pyserve.text.parts import (
    Content,
    Part,
    Plain,
    Reasoning,
    ToolCall,
    content_of,
    joined,
    num_chars,
    pass_on,
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


class Shout:
    """Holds everything until the end."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, content: Content) -> Sequence[Part]:
        self._held += content.text
        return []

    def flush(self) -> Sequence[Part]:
        return [Content(self._held.upper())]


def test_a_stage_gets_only_what_another_takes_for_content() -> None:
    stage = Shout()
    assert pass_on([Reasoning("a"), Content("b")], stage) == [Reasoning("a")]
    assert pass_on([Content("c"), ToolCall(0, "id", "f")], stage) == [ToolCall(0, "id", "f")]
    assert stage.flush() == [Content("BC")]


def test_texts_of_one_kind_are_joined_in_their_order() -> None:
    parts: list[Part] = [
        Reasoning("a", (1,)), Reasoning("b", (2, 3)), Content("c"), Content(""), Reasoning("d"),
        ToolCall(0, "id", "f"), ToolCall(0, arguments="{", tokens=(5,)), ToolCall(1, "x", "g"),
        Content("e"), Content("f", (4,)),
    ]  # fmt: skip
    assert joined(parts) == [
        Reasoning("ab", (1, 2, 3)), Content("c"), Reasoning("d"),
        ToolCall(0, "id", "f", "{", (5,)), ToolCall(1, "x", "g"), Content("ef", (4,)),
    ]  # fmt: skip
    assert joined([]) == []


def test_joining_many_parts_takes_time_in_proportion_to_them() -> None:
    parts = [Reasoning("abcd ", (i,)) for i in range(100_000)]  # all that a slow reader left
    began_s = time.thread_time()
    (part,) = joined(parts)
    assert time.thread_time() - began_s < 2.0  # 35 s, where each was put behind the ones before
    assert part == Reasoning("abcd " * 100_000, tuple(range(100_000)))


def test_whole_answers_gather_the_parts() -> None:
    assert content_of(CALLS) == "Now."
    assert reasoning_of(CALLS) == "So on"
    assert tool_calls_of(CALLS) == [ToolCall(0, "a", "f", '{"x":1}'), ToolCall(1, "b", "g", "{}")]
    assert num_chars(CALLS) == len("Now.") + len("So on") + len('{"x":1}') + len("{}")
