"""What hostile chat templates cost: never more than their time, never a gigabyte."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from bench.hostile_templates import crafted_pairs
from pyserve.errors import ChatTemplateError, CheckpointError, InvalidRequestError
from pyserve.text import template_probe
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.template_limits import MAX_CHARS, Meter, TemplateLimitError
from pyserve.text.template_source import compile_template
from pyserve.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hello"}]
TIME_LIMIT_S = 0.05  # of templates that would go on for ever
X = "{% set x = 'a' * 8000000 %}"
LINES = r"{% set x = '\n' * 8000000 %}"
TABS = r"{% set x = '\t' * 8000000 %}"
MANY_KEYS = "{% set d = dict(range(70000)|map('string')|batch(2)|list) %}"
NUMBERS = "{% set x = range(100000)|list %}{% set y = range(100000)|list %}"
FOREVER = "{% for i in range(100000) %}{% for j in range(100000) %}BODY{% endfor %}{% endfor %}"
DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(64) %}STEP{% endfor %}{{ ns.x }}"


def forever(body: str, before: str = "") -> str:
    return before + FOREVER.replace("BODY", body)


def double(start: str, step: str) -> str:
    return DOUBLE.replace("START", start).replace("STEP", step)


def render(source: str, time_limit_s: float = 60.0) -> str:
    template = ChatTemplate(source, special_tokens={})
    return template.render(MESSAGES, time_limit_s=time_limit_s)


SLOW = [
    forever(""),
    forever("{% set y = x %}", NUMBERS),
    forever("{% if x == y %}{% endif %}", NUMBERS),
    forever("{% if x is eq(y) %}{% endif %}", NUMBERS),
    forever("{% if 'b' in x %}{% endif %}", X),
    forever("{% set z = x|sum %}", NUMBERS),
    forever("{% set z = x|length %}", NUMBERS),
    forever("{% if cycler(1, 2).next() %}{% endif %}"),
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block b %}{% for i in range(9) %}{% endfor %}{% endblock %}" + forever("{{ self.b() }}"),
    NUMBERS + "{% if x == y %}{% endif %}" * 1000,
    NUMBERS + "{% set z = x is eq(y) %}" * 1000,
    NUMBERS + "{% set s = 'a' * 8000000 %}{{ x|map('string')|select('in', s)|list }}",
    "{% set d = {'a': 1} %}{{ range(30000)|sort(attribute='a,' * 9999)|list }}",
    "{% set d = {'a': {'a': {}}} %}"
    "{{ range(99999)|map(attribute='a.' * 99999, default=d)|list|length }}",
]
LARGE = [
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * 1000000000 }}",
    "{{ 1000000000 * [1] }}",
    "{{ 'x'|center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.zfill(1000000000) }}",
    "{{ (9**9)**(9**9) }}",
    "{{ 9**99999999 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%99999999999999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999s'|format(1) }}",
    "{{ '%(a)s%(a)s%(a)s' % {'a': 'x' * 8000000} }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=999999999) }}",
    "{{ '{a}{a}'.format_map({'a': 'x' * 8000000}) }}",
    X + "{{ '{0}{0}'.format(x) }}",
    X + "{{ x.replace('a', x) }}",
    X + "{{ x|replace('a', x) }}",
    X + "{{ x.join(x) }}",
    X + "{{ x.join(range(10)|map('string')) }}",
    X + "{{ [x, x]|join }}",
    X + "{{ range(99)|join(x) }}",
    X + "{{ x ~ x }}",
    X + "{{ x + x }}",
    X + "{{ ('&' * 8000000)|e }}",
    X + "{% filter replace('a', 'bb') %}{{ x }}{% endfilter %}",
    X + "{% for i in range(100000) %}{{ x }}{% endfor %}",
    X + "{% for i in range(100000) %}{% set y = '1' ~ x %}{% endfor %}",
    X + "{{ range(99999)|map(attribute='q', default=x)|list }}",
    X + "{{ {}.fromkeys(range(1000), x) }}",
    LINES + "{{ x|indent(100000, true, true) }}",
    LINES + "{{ x|indent('ab', true, true) }}",
    TABS + "{{ x.expandtabs(100000) }}",
    TABS + "{{ x.expandtabs(tabsize=100000) }}",
    FOREVER.replace("BODY", "a" * 1000),
    "{% macro f() %}" + FOREVER.replace("BODY", "a" * 1000) + "{% endmacro %}{{ f() }}",
    double("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
    double("'a'", "{% set ns.x = ns.x + ns.x %}"),
    double("'a'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    double("['a']", "{% set ns.x = [ns.x, ns.x] %}"),
    double("['a']", "{% set ns.x = (ns.x, ns.x) %}"),
    double("['a']", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    double("{}", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    double("['a']", "{% set ns.x = [ns.x]|batch(2, ns.x)|list %}"),
    double("['a']", "{% set ns.x = {'a': ns.x, 'b': ns.x}.items()|list %}"),
    double("[]", "{% set ns.x = [ns.x] %}") + "{{ ns.x|tojson(indent=100000) }}",
    "{{ [[1]] * 200000 }}",
    X + "{{ 'aab'.strip(x) }}",
    X + "{{ x|trim('b' * 8000000) }}",
    X + "{{ x|title }}",
    X + "{{ x.format(1) }}",
    X + "{{ range(99999)|map(attribute='q', default=x)|sort|first }}",
    X + "{{ 'b' in range(99999)|map(attribute='q', default=x) }}",
    X + "{{ {'a': x}|items|batch(99999, x)|list }}",
    "{{ range(99999)|map('center', 9999)|first }}",
    "{% set x = [range(50000)|list] * 5 %}{{ x|sum(start=[]) }}",
    "{{ 1.5|round(100000000, 'ceil') }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ 'a'.encode('utf8') }}",
    "{{ 'a'|safe|map('string')|list }}{{ ('a'|safe).unescape() }}",
    "{{ [1]|batch(1000000000, 1)|list }}",
    "{{ [1]|slice(1000000000)|list }}",
    "{{ messages|tojson(indent=100000000) }}",
    X + "{{ [1, 2, 3, 4]|tojson(separators=(x, x)) }}",
    "{{ range(100000)|map('string')|map('center', 100000)|map('length')|sum }}",
    "{{ ('a ' * 4000000).split()|length }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f() %}{{ caller() }}{% call f() %}x{% endcall %}{% endmacro %}"
    "{% call f() %}y{% endcall %}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
]


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of an endless template would take their whole time in each test."""
    monkeypatch.setattr(template_probe, "MAX_PROBE_S", 0.02)


def short(source: str) -> str:
    return source if len(source) < 100 else source[:99] + "…"


@pytest.mark.parametrize("source", SLOW, ids=short)
def test_an_endless_template_is_stopped_in_time(source: str) -> None:
    template = ChatTemplate(source, special_tokens={})
    began_s = time.thread_time()
    with pytest.raises(ChatTemplateError, match="takes longer than 0.05 s") as caught:
        template.render(MESSAGES, time_limit_s=TIME_LIMIT_S)
    assert caught.value.is_timeout and caught.value.status == 500
    assert time.thread_time() - began_s < TIME_LIMIT_S + 2.0


@pytest.mark.parametrize("source", LARGE, ids=short)
def test_a_template_that_makes_too_much_is_stopped(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render(source)
    assert not caught.value.is_timeout


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a,b'.split(',')|join('-') }}{{ ', '.join(['x', 'y']) }}", "a-bx, y"),
        ("{{ 'x'.center(3) }}|{{ 'x'|center(3) }}|{{ '7'.zfill(3) }}", " x | x |007"),
        ("{{ '%s=%03d' % ('a', 5) }} {{ '%s!'|format('hi') }} {{ '{}{a}'.format(1, a=2) }}",
         "a=005 hi! 12"),
        ("{{ 'a\nb'|indent(2, true) }}{{ 'abc'|replace('b', 'xx') }}{{ 'abc'.replace('c', '') }}",
         "  a\n  baxxcab"),
        ("{{ [1, 2.5]|sum }} {{ messages|sum(attribute='role', start='') }}", "3.5 user"),
        ("{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 2 }} {{ 1 / 2 }} {{ 2 ** -1 }}", "1024 3 1 0.5 0.5"),
        ("{{ {'a': 1}.items()|list }} {{ {'b': 2}.get('b') }} {{ messages[0].get('x', 0) }}",
         "[('a', 1)] 2 0"),
        ("{% for a in [3, 1]|sort %}{{ a }}{{ loop.index }}{{ loop.cycle('x', 'y') }}{% endfor %}",
         "11x32y"),
        ("{{ 1.26|round(1) }}{{ 'abcdef'[1:3] }}{{ [1, 2, 3][::-1] }}{{ (1, 2)[1:] }}",
         "1.3bc[3, 2, 1](2,)"),
        ("{{ messages|tojson(indent=2) }}", '[\n  {\n    "role": "user",\n    "content": "hello"\n'
                                            "  }\n]"),
        ("{% macro m(a, b=1) %}{{ a ~ b ~ caller() }}{% endmacro %}{% call m('x') %}!{% endcall %}",
         "x1!"),
        ("{{ range(3)|map('string')|map('upper')|join(',') }}{{ ['x', 'y']|join(d='+') }}",
         "0,1,2x+y"),
        ("{{ (['a'] * 2) + ['b'] }}{{ namespace(a=1) }}", "['a', 'a', 'b']<Namespace>"),
        ("{{ messages|map(attribute='content')|first|upper|trim('O') }}", "HELL"),
        ("{{ '\t'.expandtabs(2) }}|{{ 'long text here'|truncate(8, true) }}|{{ 'a'|e }}",
         "  |long ...|a"),
        ("{{ [1, 2, 3]|select('odd')|first }}{{ ['a']|map('upper')|list }}{{ 'a b'|title }}",
         "1['A']A B"),
        ("{% for k, v in {'a': 1}|items %}{{ k }}{{ v }}{{ loop.length }}{% endfor %}", "a11"),
        ("{% for r in [1, 2, 3]|batch(2) %}{{ r|join }};{% endfor %}{{ 'xax'.strip('x') }}",
         "12;3;a"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    ],
)  # fmt: skip
def test_ordinary_templates_are_not_disturbed(source: str, text: str) -> None:
    assert render(source) == text


def test_dates_of_a_thousand_characters_at_most() -> None:
    with pytest.raises(InvalidRequestError):
        render("{{ strftime_now('%Y' * 1000000) }}")


def test_the_limit_grows_with_the_request() -> None:
    content = "x" * (2 * MAX_CHARS)
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content + '!' }}{{ m.content }}{% endfor %}",
        special_tokens={},
    )
    assert len(template.render([{"role": "user", "content": content}])) == 2 * len(content) + 1


def test_shared_values_are_weighed_once_and_cycles_have_no_weight_to_wait_for() -> None:
    meter = Meter()
    shared = ["x" * 1000] * 100
    assert meter.weigh([shared, shared]) > 2 * 100 * 1000
    cycle: list[object] = []
    cycle.append(cycle)
    with pytest.raises(TemplateLimitError, match="100 deep"):
        meter.weigh(cycle)
    assert render("{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a }}") == "[<Namespace>]"


def test_a_thousand_messages_take_milliseconds() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m['content'] | trim }}"
        "{% elif m.role is string %}{{ '<a>' + m.content }}{% endif %}{% endfor %}",
        special_tokens={},
    )
    messages = [{"role": "user", "content": "hello " * 20}] * 1000
    times = []
    for _ in range(5):
        began_s = time.thread_time()
        template.render(messages)
        times.append(time.thread_time() - began_s)
    assert min(times) < 0.1


MODERN = """\
{%- macro kind(spec, depth=0) -%}
    {%- if spec.type == 'array' -%}{{ kind(spec['items'], depth + 1) }}[]
    {%- elif spec.enum is defined -%}{{ '"' + spec.enum|join('" | "') + '"' }}
    {%- elif spec.properties is mapping -%}
        {{- '{\\n' }}
        {%- for name, inner in spec.properties.items() -%}
            {{- '  ' * (depth + 1) ~ name ~ ('?' if name not in (spec.required or []) else '') }}
            {{- ': ' }}{{ kind(inner, depth + 1) }}{{ ',\\n' if not loop.last else '\\n' }}
        {%- endfor -%}
        {{- '}' }}
    {%- else -%}{{ spec.type|default('any', true) }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=messages|length - 1, found=false) -%}
{%- for message in messages[::-1] -%}
    {%- set index = (messages|length - 1) - loop.index0 -%}
    {%- if message.role == 'user' and message.content is string and not ns.found -%}
        {%- set ns.last = index -%}{%- set ns.found = true -%}
    {%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] -%}
    {{- tool.function.name ~ kind(tool.function.parameters) ~ '\\n' ~ tool|tojson(indent=4) }}
{%- endfor -%}
{%- set users = messages|selectattr('role', 'equalto', 'user')|list -%}
{{- '%d of %d; ' % (users|length, messages|length) }}
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if loop.previtem is defined and loop.previtem.role == message.role -%}
        {{- raise_exception('roles must alternate') -}}
    {%- endif -%}
    {%- if '</think>' in content -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {%- if content is iterable and content is not string -%}{%- continue -%}{%- endif -%}
    {{- '<|' ~ message.role|upper ~ '|>' ~ content|trim ~ ('*' if loop.index0 == ns.last) -}}
    {%- if loop.index > 8 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|ASSISTANT|>' }}{%- endif -%}
"""


def test_what_newer_models_do_equals_transformers(byte_level: Tokenizer) -> None:
    parameters = {
        "type": "object", "required": ["a"],
        "properties": {"a": {"type": "array", "items": {"type": "string"}},
                       "b": {"enum": ["x", "y"]}, "c": {}},
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    messages = [
        {"role": "user", "content": " a "}, {"role": "assistant", "content": "<think>b</think>\nc"},
        {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"},
    ]  # fmt: skip
    reference = PreTrainedTokenizerFast(tokenizer_file=str(byte_level.folder / "tokenizer.json"))
    expected = reference.apply_chat_template(
        messages, tools=tools, chat_template=MODERN, tokenize=False, add_generation_prompt=True
    )
    prompt = ChatTemplate(MODERN, special_tokens={}).render(messages, tools)
    assert prompt == expected and "a: string[]" in prompt and "<|USER|>d*" in prompt


# Each is one call into C, or one that goes on for long without coming back here; before there was
# a limit for it, it took seconds to minutes in which no other thread of the process ran.
SLOW_IN_C = [
    "{% set x = 'a' * 8000000 %}{{ x.METHOD('a' * 2000000 ~ 'b' ~ 'a' * 1999999) }}",
    "{% set x = 'a' * 8000000 %}{{ x.METHOD('ab' ~ 'a' * 1000) }}",
]


@pytest.mark.parametrize("source", SLOW_IN_C)
@pytest.mark.parametrize("method", ["rfind", "rindex", "rsplit", "rpartition"])
def test_a_search_from_the_end_is_bounded(source: str, method: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(ChatTemplateError, match="too long a text from the end"):
        render(source.replace("METHOD", method))
    assert time.thread_time() - began_s < 1.0


def test_a_search_from_the_end_as_templates_make_it() -> None:
    source = "{{ (('x' * 4000000) ~ '</think>y').rsplit('</think>')[-1] }}"
    assert render(source) == "y"


def test_numbers_of_one_hash_make_no_dict() -> None:
    pairs = ",".join(f"({number * (2**61 - 1)},0)" for number in range(300))
    for source in (f"{{{{ dict([{pairs}])|length }}}}", f"{{% set x = namespace([{pairs}]) %}}"):
        with pytest.raises(ChatTemplateError, match="as a key"):
            render(source)
    assert render("{{ dict([(1, 'a'), ('b', 2)])[1] }}") == "a"


@pytest.mark.parametrize(
    "name", ["sort", "unique|list", "groupby('a')", "slice(3)|list", "batch(3)|list", "min", "max"]
)
def test_a_text_is_not_taken_apart_into_too_many_characters(name: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(ChatTemplateError) as caught:
        render("{% set x = 'a b ' * 2000000 %}{{ (x|" + name + ")|length }}")
    assert not caught.value.is_timeout and time.thread_time() - began_s < 1.0


def test_a_filter_that_compares_for_ever_is_stopped_in_time() -> None:
    one = 2**61 - 1
    with pytest.raises(ChatTemplateError, match="longer than 0.05 s"):
        source = f"{{{{ range(0, {one} * 90000, {one})|unique|list|length }}}}"
        render(source, TIME_LIMIT_S)


@pytest.mark.parametrize("form", ["x.lower()", "x|lower", "x.swapcase()", "x|title", "x|urlencode"])
def test_cases_beyond_ascii_are_bounded(form: str) -> None:
    with pytest.raises(ChatTemplateError, match="uses a text of more than"):
        render("{% set x = '\u0130' * 4000000 %}{{ (" + form + ")|length }}")


def test_keys_of_one_hash_are_refused_wherever_a_dict_or_a_set_is_made() -> None:
    numbers = [number * (2**61 - 1) for number in range(300)]
    pairs = crafted_pairs(100)
    assert len(set(map(hash, pairs))) == 1
    listed = ",".join(map(str, pairs))
    for source, says in (
        ("{{ {" + ",".join(f"{number}: 0" for number in numbers) + "}|length }}", "as a key"),
        ("{{ {" + ",".join(f"{pair}: 0" for pair in pairs) + "}|length }}", "a tuple as a key"),
        ("{{ dict([" + listed + "]|batch(2))|length }}", "a tuple as a key"),
        ("{{ dict([{'a': " + str(2**61) + ", 'b': 0}.values()]) }}", "as a key"),
        ("{{ {" + ",".join(f"{a}: {b}" for a, b in pairs) + "}.items() - [] }}", "subtracts with"),
        ("{{ [" + listed + "] - {}.items() }}", "subtracts with"),
        ("{{ (range(0, 2**61 * 9999, 2**61 - 1) - {}.keys())|length }}", "subtracts with"),
        ("{{ {(-1)**0.5: 0} }}", "a complex as a key"),
        ("{{ dict([[(-1)**0.5, 0]]) }}", "a complex as a key"),
    ):
        with pytest.raises(ChatTemplateError, match=says):
            render(source)
    made = "{{ {1: 'a', 'b': 2, none: 3, 1.5: 4, true: 5}|length }}{{ dict([('a', 1)], b=2).b }}"
    assert render(made + "{{ dict({'a': 7}).a }}") == "427"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (X + "{% macro f() %}{% endmacro %}{{ f(*x) }}", "makes a value of more than"),
        (X + "{{ cycler(*x) }}", "makes a value of more than"),
        (X + "{{ x.split('a') }}", "makes a value of more than"),
        (X + "{{ x.rsplit('a', 900000) }}", "makes a value of more than"),
        (LINES + "{{ x|indent(0) }}", "makes a value of more than"),
        (X + "{{ x.strip('b' * 500 ~ 'a') }}", "uses a text of more than 256"),
        (X + "{{ x|int }}", "uses a text of more than"),
        (X + "{{ x|float }}", "uses a text of more than"),
        ("{{ ('%%' * 4000000) % () }}", "uses a text of more than"),
        (X + "{{ '%a' % x }}", "escapes more than"),
        (X + "{{ '%la' % x }}", "escapes more than"),
        (X + "{{ '%(a)-5r' % {'a': x} }}", "escapes more than"),
        (X + "{{ '%(a(b))a' % {'a(b)': x} }}", "escapes more than"),
        (X + "{{ '{!a}'.format(x) }}", "escapes more than"),
        (X + "{{ x|tojson(ensure_ascii=true) }}", "escapes more than"),
        ("{{ range(80000)|map('string')|batch(1)|list|sort }}", "sorts more than 32768"),
        ("{{ range(80000)|list|groupby('real') }}", "sorts more than 32768"),
        ("{{ range(30000)|map('string')|batch(1)|batch(1)|list|sort }}", "sorts lists of more"),
        ("{% for x in [[1]] %}{{ loop|sort }}{% endfor %}", "sorts what is not made yet"),
        (MANY_KEYS + "{{ d|tojson(sort_keys=true)|length }}", "sorts more than 32768"),
        (MANY_KEYS + "{{ [{'a': d}]|tojson(sort_keys=true)|length }}", "sorts more than 32768"),
    ],
    ids=short,
)
def test_a_call_that_would_hold_the_lock_for_long_is_refused(source: str, says: str) -> None:
    began_s = time.thread_time()
    with pytest.raises(ChatTemplateError, match=says) as caught:
        render(source)
    assert not caught.value.is_timeout and time.thread_time() - began_s < 2.0


@pytest.mark.parametrize("source", ["(':' * 65536).format()", "('%(' * 32768) % {}"])
def test_what_a_format_may_hold_is_found_out_in_one_pass(source: str) -> None:
    began_s = time.thread_time()
    with contextlib.suppress(InvalidRequestError):
        render("{{ (" + source + ")|length }}")
    assert time.thread_time() - began_s < 0.3


def test_what_templates_do_with_long_messages_is_not_refused() -> None:
    text = "line\n" * 200_000
    source = (
        "{% set c = messages[0].content %}{{ c.split('</think>')[-1]|length }} "
        "{{ c.rsplit('e', 1)|length }} {{ c.split('\\n')|length }} {{ c|indent(2)|length }} "
        "{{ (c|trim)|length }} {{ c|tojson|length }} {{ ('%s' % c)|length }}"
    )
    template = ChatTemplate(source, special_tokens={})
    prompt = template.render([{"role": "user", "content": text}])
    assert prompt == "1000000 2 200001 1399998 999999 1200002 1000000"


def test_the_python_that_a_template_makes_is_bounded() -> None:
    """Compiling it is one call into C too."""
    with pytest.raises(CheckpointError, match="characters of Python, the limit is 262144"):
        compile_template("{{a}}" * 13000, "chat_template")
    compile_template("{{a}}" * 1000 + "x" * 100_000, "chat_template")
