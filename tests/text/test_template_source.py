from __future__ import annotations

from datetime import datetime

import jinja2
import pytest

from pyserve.errors import CheckpointError
from pyserve.text.template_limits import Meter, metering
from pyserve.text.template_source import TemplateRefusal, Traits, compile_template


def render(source: str, **variables: object) -> str:
    with metering(Meter()):
        return compile_template(source, "test")[0].render(variables)


def traits(source: str) -> Traits:
    return compile_template(source, "test")[1]


def test_blocks_leave_no_white_space_of_their_own() -> None:
    source = "{% for i in range(3) %}\n    {% if i == 1 %}\n{{ i }}\n    {% endif %}\n{% endfor %}"
    assert render(source) == "1\n"


def test_what_templates_of_models_use() -> None:
    assert render("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
                  ) == "012"  # fmt: skip
    assert render("a{% generation %}b{% set x = 1 %}{% endgeneration %}c{{ x }}") == "abc"
    assert render("{{ v | tojson }}", v={"k": "é<&'\""}) == '{"k": "é<&\'\\""}'
    assert render("{{ v | tojson(indent=2) }}", v=[1]) == "[\n  1\n]"
    assert render("{{ v | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
                  v={"b": "é", "a": 1}) == '{"a":1,"b":"\\u00e9"}'  # fmt: skip
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{% set ns = namespace(n=1) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}"
                  "{% endfor %}{{ ns.n }}") == "4"  # fmt: skip
    assert render("{{ dict(a=1).a }}{{ missing }}") == "1"
    with pytest.raises(TemplateRefusal, match="^roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ (strftime_now | attr('__globals__')).items() }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ range(10000000) | list }}",
        "{{ lipsum() }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    messages = [1]
    with pytest.raises((jinja2.TemplateError, TypeError, OverflowError)):
        render(source, messages=messages)
    assert messages == [1]


def test_syntax_errors_name_source_and_line() -> None:
    with pytest.raises(CheckpointError, match=r"file: not a valid chat template: .*\(line 2\)"):
        compile_template("ok\n{% if %}", "file")
    for huge in ("1" * 5000, "0x" + "f" * 5000):
        with pytest.raises(CheckpointError, match="not a valid chat template"):
            compile_template("{{ " + huge + " }}{{ 1 + " + huge + " }}", "file")
    with pytest.raises(CheckpointError, match="1048577 characters, the limit is 1048576"):
        compile_template("x" * (2**20 + 1), "file")
    loops = 30
    with pytest.raises(CheckpointError, match="nested too deeply"):
        compile_template("{% for i in x %}" * loops + "{% endfor %}" * loops, "file")
    with pytest.raises(CheckpointError, match="nested too deeply"):
        compile_template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "file")


@pytest.mark.parametrize(
    ("source", "content_format"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "string"),
        ("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", "string"),
        ("{% for m in messages %}{% for p in m.content.split('x') %}{% endfor %}{% endfor %}",
         "string"),
        ("{% for d in documents %}{{ d.content }}{% endfor %}", "string"),
        ("{% for m in messages %}{% for p in m['content'] %}{{ p.text }}{% endfor %}{% endfor %}",
         "openai"),
        ("{% for m in messages %}{% for p in m.content | selectattr('type') %}{% endfor %}"
         "{% endfor %}", "openai"),
        ("{% for m in messages %}{% for p in m.content[1:] %}{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% set c = m.content %}{% set d = c %}{% for p in d %}"
         "{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% set c = m.content if m.content else [] %}{% for p in c %}"
         "{% endfor %}{% endfor %}", "openai"),
        ("{% for m in messages %}{% set c = m.content or [] %}{% for p in c %}"
         "{% endfor %}{% endfor %}", "openai"),
        ("{% macro show(x, y) %}{% for p in y %}{{ p.text }}{% endfor %}{% endmacro %}"
         "{{ show(1, messages[0].content) }}", "openai"),
        ("{% macro show(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}"
         "{{ show(x=messages[0]['content']) }}", "openai"),
        ("{% macro show(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}"
         "{{ show(tools) }}{{ messages[0]['content'] }}", "string"),
    ],
)  # fmt: skip
def test_content_format(source: str, content_format: str) -> None:
    assert traits(source).content_format == content_format


def test_other_traits() -> None:
    none = traits("{{ messages[0].content }}")
    assert not (none.tests_string or none.tests_none or none.knows_developer)
    assert not none.arguments_as_text
    assert traits("{% if m.content is string %}{% endif %}").tests_string
    assert not traits("{% if m.name is string %}{% endif %}").tests_string
    assert traits("{% if m.content is not none %}{% endif %}").tests_none
    assert traits("{% if m['content'] != none %}{% endif %}").tests_none
    assert traits("{% if m.role == 'developer' %}{% endif %}").knows_developer
    assert traits("{{ 'x' + c['function']['arguments'] + 'y' }}").arguments_as_text
    assert traits("{{ c.arguments ~ 'y' }}").arguments_as_text
    assert not traits("{{ 'x' + c.arguments | tojson }}").arguments_as_text
    source = "{% set b = a %}{% for m in ms %}{{ m.c }}{{ range(b) }}{% endfor %}"
    assert traits(source).variables == {"a", "ms"}
