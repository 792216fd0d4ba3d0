"""Tools in words, for templates that do not show them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pyserve.text.chat_template import ChatTemplate
from pyserve.text.told_tools import calls_in_words, in_words
from pyserve.text.tool_parsers.json_formats import FORMATS

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now", "description": "¿Qué hora es?"}},
]
MISTRAL = FORMATS["mistral"].written[-1]
HERMES = FORMATS["hermes"].written[0]
SYSTEM = {"role": "system", "content": "Be brief."}
USER: dict[str, Any] = {"role": "user", "content": "¿Qué tal?"}
CALLS: dict[str, Any] = {
    "role": "assistant", "content": None,
    "tool_calls": [
        {"id": "a", "type": "function",
         "function": {"name": "get_weather", "arguments": '{"city": "París"}'}},
        {"id": "b", "type": "function", "function": {"name": "now", "arguments": None}},
    ],
}  # fmt: skip
RESULTS: list[dict[str, Any]] = [
    {"role": "tool", "tool_call_id": "a", "content": "21 °C"},
    {"role": "tool", "tool_call_id": "b", "content": "12:00"},
]
# As the templates of older models are: turns of two roles, and no other.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


def told(messages: list[dict[str, Any]], *, has_system: bool = False) -> list[dict[str, Any]]:
    before = copy.deepcopy(messages)
    found = in_words(messages, TOOLS, MISTRAL, has_system=has_system)
    assert messages == before
    return found


def test_the_first_message_tells_of_the_tools() -> None:
    (message,) = told([USER])
    assert message["role"] == "user" and message["content"].endswith("\n\n¿Qué tal?")
    assert '\n{"name": "now", "description": "¿Qué hora es?"}\n' in message["content"]
    form = '[TOOL_CALLS] [{"name": "FUNCTION", "arguments": {"PARAMETER": "VALUE"}}]'
    assert f"\n{form}\n" in message["content"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_message_does_where_there_is_one(role: str) -> None:
    first, second = told([{**SYSTEM, "role": role}, USER])
    assert (first["role"], second) == (role, USER)
    assert first["content"].startswith("Be brief.\n\nYou can call these functions")


def test_a_template_with_a_system_role_gets_such_a_message() -> None:
    first, second = told([USER], has_system=True)
    assert first["role"] == "system" and second == USER


def test_a_conversation_that_the_assistant_begins() -> None:
    begun = {"role": "assistant", "content": "Hola"}
    first, *others = told([begun])
    assert first["role"] == "user" and others == [begun]


def test_parts_stay_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = told([{"role": "user", "content": parts}])
    assert message["content"][1:] == parts and "You can call" in message["content"][0]["text"]


def test_calls_and_results_are_text_in_turns() -> None:
    thanks = {"role": "user", "content": "Gracias"}
    first, calls, results = told([USER, CALLS, *RESULTS, thanks])
    assert first["content"].endswith(USER["content"])
    assert calls == {
        "role": "assistant",
        "content": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "París"}}, '
        '{"name": "now", "arguments": {}}]',
    }
    assert results == {
        "role": "user",
        "content": "Result of get_weather:\n21 °C\n\nResult of now:\n12:00\n\nGracias",
    }


def test_text_in_front_of_calls_stays_there() -> None:
    said = in_words([USER, {**CALLS, "content": "Miro."}], TOOLS, HERMES, has_system=False)[1]
    assert said["content"].startswith('Miro.\n\n<tool_call>\n{"name": "get_weather", "arguments"')


def test_a_result_of_an_unknown_call() -> None:
    unknown = {"role": "tool", "tool_call_id": "x", "content": "1"}
    assert told([USER, CALLS, unknown])[-1]["content"] == "Result:\n1"
    assert told([USER, CALLS, {**unknown, "name": "f"}])[-1]["content"] == "Result of f:\n1"


def test_a_template_that_knows_two_roles_renders_all_of_it() -> None:
    template = ChatTemplate(STRICT, special_tokens={})
    assert template.unused(["tools"]) and not template.shows_role("system")
    answer: dict[str, Any] = {"role": "assistant", "content": "21 °C."}
    for messages in ([USER], [USER, CALLS, *RESULTS], [USER, CALLS, *RESULTS, answer, USER]):
        text = template.render(told(messages), add_generation_prompt=True)
        assert text.count("[INST]") == 1 + (len(messages) > 1) + (len(messages) > 4)
        assert text.count("You can call") == 1
    assert not template.shows_role("tool")
    assert "[INST] Result of now" in template.render(
        calls_in_words([USER, CALLS, RESULTS[1]], MISTRAL)
    )
