"""Conversations of agents on templates that demand an order: what is changed, and what stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.template_probe import Place, probe
from pyserve.text.template_source import compile_template
from pyserve.text.turn_order import in_order

LATE, ROW, BEHIND = "late system", "row", "user behind result"
SYSTEM_FIRST = (  # as Qwen's newest
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}*{% endfor %}{% endfor %}"
)
IN_TURNS = (  # as Mistral's: turns are counted without calls and results
    "{% set ns = namespace(i=0) %}"
    "{% if messages[0].role == 'system' %}{{ '[S]' + messages[0].content }}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and m.tool_calls is not defined) %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}"
    "{% if m.role == 'user' %}[I]{{ m.content }}[/I]"
    "{% elif m.role == 'tool' %}[R]{{ m.content }}[/R]"
    "{% elif m.tool_calls is defined %}[C]{{ m.tool_calls | length }}[/C]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>"
    "{% else %}{{ raise_exception('only users and assistants') }}{% endif %}{% endfor %}"
)
WITHOUT_SYSTEM = (  # as Gemma's
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('system') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)
DROPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }};"
    "{% elif m.role == 'assistant' %}A:{{ m.content }};{% elif m.role == 'system' and loop.first %}"
    "S:{{ m.content }};{% endif %}{% endfor %}"
)
ANY = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% endfor %}"
HOISTING = (  # as DeepSeek's: all system messages come first
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content or '' }}{% endfor %}"
)
ALL = frozenset[Place](("system", "late system", "row", "user behind result"))


def say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(number: int = 1) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}"}
    return say("assistant", "", tool_calls=[{"id": f"c{number}", "function": function}])


SYSTEM, USER, ANSWER, MORE = (
    say("system", "s"), say("user", "u"), say("assistant", "a"), say("user", "v"),
)  # fmt: skip
LATER = say("system", "t")
RESULT = say("tool", "r", tool_call_id="c1")
# As Claude Code and Codex have it, one turn after the other.
AGENT = [
    say("developer", "p"), SYSTEM, USER, LATER, call(), RESULT, MORE, LATER, call(2), RESULT,
    ANSWER, LATER, USER, MORE,
]  # fmt: skip


def render(source: str, messages: list[dict[str, Any]]) -> tuple[str, str]:
    before = copy.deepcopy(messages)
    prompt = ChatTemplate(source, special_tokens={}).render(messages, add_generation_prompt=False)
    assert messages == before
    return str(prompt), prompt.merged


@pytest.mark.parametrize(
    ("source", "refused", "dropped"),
    [
        (ANY, (), ()),
        (HOISTING, (), ()),
        (SYSTEM_FIRST, (LATE,), ()),
        (IN_TURNS, (LATE, ROW, BEHIND), ()),
        (WITHOUT_SYSTEM, ALL, ()),
        (DROPPING, (LATE,), (LATE,)),
        ("{{ raise_exception('no') }}", (), ()),
        ("{{ messages | length }}", (), ()),
    ],
)
def test_probes_find_what_a_template_refuses(source: str, refused: Any, dropped: Any) -> None:
    traits = probe(compile_template(source, "test")[0], {})
    assert traits.refused == frozenset(refused) and traits.dropped == frozenset(dropped)


@pytest.mark.parametrize(
    "source", [SYSTEM_FIRST, IN_TURNS, WITHOUT_SYSTEM, DROPPING, ANY, HOISTING]
)
def test_what_a_template_takes_stays(source: str) -> None:
    assert render(source, [USER, ANSWER, MORE])[1] == ""
    if source != WITHOUT_SYSTEM:
        assert render(source, [SYSTEM, USER, ANSWER, MORE])[1] == ""
    if source in (ANY, HOISTING):
        assert render(source, AGENT)[1] == ""


@pytest.mark.parametrize(
    ("source", "messages", "prompt", "merged"),
    [
        (SYSTEM_FIRST, [SYSTEM, USER, LATER], "<system>s<user>u<user>t", "system"),
        (SYSTEM_FIRST, [SYSTEM, LATER, USER, MORE], "<system>s\n\nt<user>u<user>v", "system"),
        (IN_TURNS, [USER, MORE], "[I]u\n\nv[/I]", "turns"),
        (IN_TURNS, [SYSTEM, USER, LATER, ANSWER, MORE], "[S]s[I]u\n\nt[/I]a</s>[I]v[/I]",
         "system, turns"),
        (IN_TURNS, [USER, ANSWER, LATER, MORE], "[I]u[/I]a</s>[I]t\n\nv[/I]", "system, turns"),
        (IN_TURNS, [USER, ANSWER, ANSWER, MORE], "[I]u[/I]a\n\na</s>[I]v[/I]", "turns"),
        (IN_TURNS, [USER, call(), RESULT, MORE], "[I]u[/I][C]1[/C][R]r\n\nv[/R]", "turns"),
        (IN_TURNS, [USER, call(), MORE, RESULT], "[I]u[/I][C]1[/C][R]r\n\nv[/R]", "turns"),
        (IN_TURNS, [USER, call(), call(2), RESULT], "[I]u[/I][C]1[/C][C]1[/C][R]r[/R]", ""),
        (WITHOUT_SYSTEM, [SYSTEM, USER], "<user>s\n\nu", "system, turns"),
        (WITHOUT_SYSTEM, [SYSTEM], "<user>s", "system"),
        (DROPPING, [SYSTEM, USER, LATER, ANSWER, MORE], "S:s;U:u;U:t;A:a;U:v;", "system"),
    ],
)  # fmt: skip
def test_what_is_done(
    source: str, messages: list[dict[str, Any]], prompt: str, merged: str
) -> None:
    assert render(source, messages) == (prompt, merged)


@pytest.mark.parametrize("source", [SYSTEM_FIRST, IN_TURNS, WITHOUT_SYSTEM, DROPPING, ANY])
def test_the_same_history_makes_the_same_prompt(source: str) -> None:
    """So that the prefix cache knows it: each request of an agent begins with the one before."""
    turns = [
        [n for n in range(1, len(AGENT) + 1) if n == len(AGENT) or AGENT[n]["role"] == "assistant"]
    ][0]
    earlier = ""
    for n in turns:
        if source == WITHOUT_SYSTEM and any("tool_calls" in m for m in AGENT[:n]):
            break  # it takes none
        prompt, _ = render(source, AGENT[:n])
        assert prompt.startswith(earlier)
        earlier = prompt.removesuffix("[/R]").removesuffix("[/I]")
    assert earlier


def test_parts_stay_parts() -> None:
    checked = [say("user", ["a", "b"]), say("user", "c"), say("system", "d")]
    (message,), done = in_order(checked, ALL)
    assert message == say("user", ["a", "b", "c", "d"]) and done == "system, turns"
    assert in_order([say("assistant", None), say("assistant", "x")], ALL)[0] == [
        say("assistant", "x")
    ]


def test_calls_and_thinking_of_assistants_in_a_row() -> None:
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "Hm.")
    first, second = {**call(), **thought}, {**call(2), **thought}
    (message,), done = in_order([first, second], ALL)
    assert [c["id"] for c in message["tool_calls"]] == ["c1", "c2"] and done == "turns"
    assert message["reasoning_content"] == "Hm.\n\nHm."


def test_a_refusal_is_the_first_ones() -> None:
    source = "{% for m in messages %}{{ raise_exception('no ' ~ m.content) }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="^no u$"):
        render(source, [USER, LATER])


def test_nothing_to_be_done() -> None:
    messages = [USER, ANSWER, MORE]
    assert in_order(messages, frozenset()) == (messages, "")
    assert in_order(messages, ALL) == (messages, "")
