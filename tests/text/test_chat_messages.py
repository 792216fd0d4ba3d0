"""In which forms a conversation is tried, and in which order."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.chat_messages import attempts
from pyserve.text.template_probe import Traits

CALL = {"id": "1", "function": {"name": "f", "arguments": '{"a":  1}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": ["a", {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "c"},
]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def contents(traits: Traits) -> list[list[Any]]:
    before = copy.deepcopy(MESSAGES)
    found = [[m.get("content", "no key") for m in way] for way, _ in attempts(MESSAGES, traits)]
    assert MESSAGES == before
    return found


def test_as_given_first_then_all_text_then_all_parts() -> None:
    either = Traits(
        {"user": ("text", "parts"), "tool": ("text", "parts")}, absent_with_calls="null"
    )
    assert contents(either) == [
        [parts("a", "b"), None, "c"],
        ["a\nb", "", "c"],
        [parts("a", "b"), [], parts("c")],
    ]


def test_a_form_that_is_not_shown_is_never_tried() -> None:
    assert contents(Traits({"user": ("text",)})) == [["a\nb", "", "c"]]
    parts_alone = Traits({"user": ("parts",), "tool": ("text",)}, absent_with_calls="missing")
    assert contents(parts_alone) == [
        [parts("a", "b"), "no key", "c"],
        [parts("a", "b"), [], "c"],
    ]


def test_where_nothing_is_known_text_comes_first() -> None:
    assert contents(Traits({})) == [["a\nb", "", "c"], [parts("a", "b"), [], parts("c")]]


def test_absent_content_is_an_assistants_alone() -> None:
    traits = Traits({}, absent="null", absent_with_calls="missing")
    roles = [{"role": role, "content": None} for role in ("assistant", "user", "system", "tool")]
    assert [m["content"] for m in next(attempts(roles, traits))[0]] == [None, "", "", ""]
    (message,), _ = next(attempts([{"role": "assistant", "tool_calls": [CALL]}], traits))
    assert "content" not in message


def test_arguments_in_the_form_that_the_template_takes() -> None:
    def arguments(as_text: bool) -> Any:
        way, _ = next(attempts(MESSAGES, Traits({}, has_text_arguments=as_text)))
        return way[1]["tool_calls"][0]["function"]["arguments"]

    assert arguments(False) == {"a": 1}
    assert arguments(True) == '{"a":  1}'


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at least one message"):
        next(attempts([], Traits({})))
