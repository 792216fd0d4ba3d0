"""What probes find out of the smallest template of each shape that models' templates have."""

from __future__ import annotations

import time

import pytest

from pyserve.text import template_probe
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.template_probe import Form, Traits, probe
from pyserve.text.template_source import compile_template
from tests.text.real_templates import CONVERSATIONS, SPECIAL_TOKENS, compare

TEXT: tuple[Form, ...] = ("text",)
PARTS: tuple[Form, ...] = ("parts",)
BOTH: tuple[Form, ...] = ("text", "parts")
NOTHING: tuple[Form, ...] = ()

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
SHOW_PARTS = "{% for p in m.content %}{{ p.text }}{% endfor %}"

SHAPES: dict[str, tuple[str, dict[str, tuple[Form, ...]]]] = {
    "text": (LOOP + "{{ m.role + m.content }}" + END,
             {"user": TEXT, "system": TEXT, "assistant": TEXT}),
    "printed as it is": (LOOP + "{{ m['content'] }}" + END, {"user": TEXT, "system": TEXT}),
    "as JSON": (LOOP + "{{ m.content | tojson }}" + END, {"user": TEXT}),
    "parts": (LOOP + SHOW_PARTS + END, {"user": PARTS, "system": PARTS, "assistant": PARTS}),
    "parts of a type": (
        LOOP + "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
        + END + END, {"user": PARTS}),
    "either": (LOOP + "{% if m.content is string %}{{ m.content }}{% else %}" + SHOW_PARTS
               + "{% endif %}" + END, {"user": BOTH, "system": BOTH, "assistant": BOTH}),
    "either, by a macro": (
        "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}{% for p in c %}{{ p.text }}"
        "{% endfor %}{% endif %}{% endmacro %}" + LOOP + "{{ show(m.content) }}" + END,
        {"user": BOTH}),
    # The name that is looped over is a message's content on a road that no message takes.
    "content under another name that is looped over": (
        LOOP + "{% if m.tool_calls is defined %}{% set calls = m.tool_calls %}{% else %}"
        "{% set calls = m.content %}{% endif %}{% if m.role == 'calls' %}"
        "{% for c in calls %}{{ c.function.name }}{% endfor %}"
        "{% else %}{{ '[' + m.content + ']' }}{% endif %}" + END,
        {"user": TEXT, "system": TEXT, "assistant": TEXT}),
    "a loop over characters": (
        LOOP + "{% for c in m.content %}{{ c }}{% endfor %}" + END, {"user": TEXT}),
    "text of the system, parts of users": (
        LOOP + "{% if m.role == 'system' %}{{ m.content + '!' }}{% else %}" + SHOW_PARTS
        + "{% endif %}" + END, {"user": PARTS, "system": TEXT, "assistant": PARTS}),
    "the first part alone": (
        LOOP + "{{ m.content if m.content is string else m.content[0].text }}" + END,
        {"user": TEXT}),
    "a system message is required": (
        "{{ messages[0].content if messages[0].role == 'system' else raise_exception('no') }}"
        + LOOP + "{{ m.content }}" + END, {"user": TEXT, "system": TEXT}),
    "tools are required": (
        "{% if not tools %}{{ raise_exception('no') }}{% endif %}" + LOOP + "{{ m.content ~ '!' }}"
        + END, {"user": TEXT}),
    "in capitals": (LOOP + "{{ m.content | upper }}" + END, {"user": TEXT}),
    "nothing of users": ("{{ messages | length }}", {"user": NOTHING}),
    "raises": ("{{ raise_exception('no') }}", {"user": NOTHING}),
}  # fmt: skip


ACCEPTED = ("equal", "other", "both refuse", "theirs refuses")
REFUSING = ("raises",)


def traits(source: str) -> Traits:
    return probe(compile_template(source, "test")[0], {"bos_token": "<s>"})


@pytest.mark.parametrize("shape", SHAPES)
def test_forms_of_content(shape: str) -> None:
    source, expected = SHAPES[shape]
    found = traits(source).content_forms
    assert {role: found.get(role, NOTHING) for role in expected} == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_renders_as_transformers_does(shape: str) -> None:
    source, _ = SHAPES[shape]
    template = ChatTemplate(source, special_tokens=SPECIAL_TOKENS)
    kinds = {name: compare(template, source, name) for name in CONVERSATIONS}
    assert not [(name, *kind) for name, kind in kinds.items() if kind[0] not in ACCEPTED]
    assert shape in REFUSING or any(kind[0] == "equal" for kind in kinds.values())


def test_what_is_not_known_is_text() -> None:
    assert Traits({}).forms("user") == Traits({}).forms("tool") == TEXT
    assert Traits({"user": PARTS}).forms("system") == PARTS


def test_content_of_tools() -> None:
    show = "{{ m.role }}{% if m.role == 'tool' %}{{ m.content + '' }}{% endif %}"
    assert traits(LOOP + show + END).content_forms["tool"] == TEXT


@pytest.mark.parametrize(
    ("show", "absent"),
    [
        ("{{ m.content }}", "missing"),  # None would be printed
        ("{{ m.content + '' }}", "empty"),
        ("{% if m.content is not none %}{{ m.content }}{% endif %}", "null"),
        ("{% if 'x' in m.content %}{% endif %}{{ m.content or '' }}", "missing"),
        ("{% if m.content is none %}none{% else %}{{ m.content }}{% endif %}", "null"),
        ("{% if m.content | length %}{{ m.content }}{% endif %}", "missing"),
        ("{{ m.content.strip() }}", "empty"),
        # As DeepSeek-R1's: what asks for none with calls looks into the text of all others.
        ("{% if m.tool_calls is defined and m.content is none %}calls{% endif %}"
         "{% if '</think>' in m.content %}{% endif %}{{ m.content + '' }}", "empty"),
    ],
)  # fmt: skip
def test_content_that_is_absent(show: str, absent: str) -> None:
    source = LOOP + "{{ m.role }}" + show + END
    assert (traits(source).absent, traits(source).absent_with_calls) == (absent, absent)


def test_absent_content_beside_calls_may_be_another() -> None:
    source = (
        LOOP + "{% if m.tool_calls is defined %}{% if m.content is not none %}{{ m.content }}"
        "{% endif %}{% else %}{{ m.content + '' }}{% endif %}" + END
    )
    assert (traits(source).absent, traits(source).absent_with_calls) == ("empty", "null")


@pytest.mark.parametrize(
    ("show", "as_text"),
    [
        ("{{ f.arguments | tojson }}", False),
        ("{{ f.arguments }}", True),  # an object would be printed with Python's quotes
        ("{{ f.name + f.arguments }}", True),
        ("{{ f.name ~ f.arguments }}", True),
        ("{% for k, v in f.arguments | items %}{{ k ~ v }}{% endfor %}", False),
        ("{% for k in f.arguments %}{{ k ~ f.arguments[k] }}{% endfor %}", False),
        ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", False),
        ("{{ f | tojson }}", False),
        ("{{ f.name }}", False),
    ],
)
def test_arguments_of_calls(show: str, as_text: bool) -> None:
    source = (
        LOOP + "{% for call in m.tool_calls or [] %}{% set f = call.function %}"
        "{{ 'call ' }}" + show + "{% endfor %}{{ m.content or '' }}" + END
    )
    assert traits(source).has_text_arguments is as_text


@pytest.mark.parametrize(
    ("show", "knows"),
    [
        ("{{ m.role }}", False),
        ("{{ m.role | upper }}", False),
        ("{# developer #}{{ 'As a developer:' }}{{ m.role }}", False),
        ("{{ 'DEV' if m.role == 'developer' else m.role }}", True),
        ("{% if m.role == 'developer' %}{{ raise_exception('no') }}{% endif %}", False),
        ("{% if m.role not in ('system', 'developer', 'user', 'assistant') %}"
         "{{ raise_exception('no') }}{% endif %}", True),
    ],
)  # fmt: skip
def test_the_developer(show: str, knows: bool) -> None:
    assert traits(LOOP + show + "{{ m.content }}" + END).has_developer is knows


def test_a_developer_whose_words_are_dropped_is_not_known() -> None:
    show = "{% if m.role != 'developer' %}{{ m.content }}{% endif %}"
    assert not traits(LOOP + show + END).has_developer


def test_names() -> None:
    show = "{% if m.role == 'user' %}{{ m.name }}{% endif %}{{ m.content }}"
    assert traits(LOOP + show + END).named_roles == {"user"}
    assert traits("{{ tools[0].function.name }}" + LOOP + "{{ m.content }}" + END).named_roles == (
        frozenset()
    )


@pytest.mark.parametrize(
    ("show", "place"),
    [
        ("{{ m.content }}", None),
        ("<think>{{ m.reasoning_content }}</think>{{ m.content }}", "field"),
        ("{{ m.thinking }}{{ m.content }}", "field"),
        ("{% if m.tool_calls %}{{ m.reasoning }}{% endif %}{{ m.content }}", "field"),
        ("{% if loop.last %}{{ m.reasoning_content }}{% endif %}{{ m.content }}", "field"),
        ("{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
         "{% if p.type == 'thinking' %}[THINK]{{ p.thinking }}[/THINK]{% else %}{{ p.text }}"
         "{% endif %}{% endfor %}{% endif %}", "part"),
        ("{{ m.content.split('</think>')[-1] }}", None),
    ],
)  # fmt: skip
def test_where_thinking_is_looked_for(show: str, place: str | None) -> None:
    assert traits(LOOP + show + END).reasoning == place


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{{ messages[0].content }}" + ENDLESS,
        "{{ 'a' * 10**9 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
    ],
)
def test_probes_have_limits_and_never_raise(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(template_probe, "MAX_PROBE_S", 0.05)
    began_s = time.thread_time()
    assert traits(source) == Traits({})
    assert time.thread_time() - began_s < 0.05 + 2.0


def num_probes(monkeypatch: pytest.MonkeyPatch, source: str) -> int:
    template, _ = compile_template(source, "test")
    rendered = []

    def render(*args: object, **kwargs: object) -> str:
        rendered.append(args)
        return original(*args, **kwargs)

    original = template.render
    monkeypatch.setattr(template, "render", render)
    probe(template, {})
    return len(rendered)


def test_probes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they take milliseconds; and one that costs too much is the last."""
    assert 10 < num_probes(monkeypatch, SHAPES["either"][0]) <= 100
    assert num_probes(monkeypatch, "{{ 'a' * 10**9 }}") == 1
