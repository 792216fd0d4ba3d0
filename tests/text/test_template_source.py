from __future__ import annotations

from datetime import datetime

import jinja2
import pytest

from pyserve.errors import CheckpointError
from pyserve.text.template_limits import Meter, metering
from pyserve.text.template_source import TemplateRefusal, compile_template


def render(source: str, **variables: object) -> str:
    with metering(Meter()):
        return compile_template(source, "test")[0].render(variables)


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


def test_the_variables_that_a_template_looks_at() -> None:
    source = "{% set b = a %}{% for m in ms %}{{ m.c }}{{ range(b) }}{% endfor %}"
    assert compile_template(source, "test")[1] == {"a", "ms"}
    own_default = "{% set thinks = thinks | default(true) %}{{ thinks }}"
    assert compile_template(own_default, "test")[1] == {"thinks"}
