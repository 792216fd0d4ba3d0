"""Hostile chats: templates whose one step in C would be long, and odd data for a sound one.

A request's own template is only looked at by a server with --trust-request-chat-template; others
refuse it. Each template here makes the interpreter do something that no other thread can interrupt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

MAX_SOURCE_CHARS = 2**16 - 1000
MAX_CHARS = 2**20
HASH_MODULUS = 2**61 - 1  # of CPython's numbers: its multiples all have the hash 0
_LARGE_CHARS = 8_000_000

TEXTS = ("a", r"\n", r"\x00", r"\U0001F600", "é", "İ", "a ", r"\"", "<", "1")
METHODS = (
    "split()", "split('a')", "rsplit('a', 900000)", "splitlines()", "upper()", "title()",
    "swapcase()", "casefold()", "expandtabs(1000)", "strip('b' * 250 ~ 'a')", "replace('a', 'bb')",
    "strip('b' * 9000 ~ 'a')", "rfind('a' * 4000 ~ 'b')", "rindex('ab' ~ 'a' * 4000)",
    "rpartition('a' * 30000 ~ 'b')", "rsplit('b' ~ 'a' * 4000)", "count('a' * 4000 ~ 'b')",
    "find('b' ~ 'a' * 4000000)", "isprintable()", "center(90000)", "zfill(99999999)",
)  # fmt: skip
FILTERS = (
    "list", "int", "float", "title", "upper", "urlencode", "e", "indent(1)", "tojson", "reverse",
    "tojson(ensure_ascii=true)", "trim('b' * 9000 ~ 'a')", "batch(3)|list", "sort", "unique|list",
    "replace('a', 'bb')", "center(9999999)", "truncate(9)", "map('upper')|list", "groupby(0)",
)  # fmt: skip
EXPRESSIONS = (
    "'%a' % x", "'%la' % x", "'%(a(b))a' % {'a(b)': x}", "'{!a}'.format(x)", "'%r'|format(x)",
    "'%.8000000f' % 0.1", "'{:8000000}'.format(1)", "('%(' * 32768) % {}",
    "(':' * 65536).format()", "('{' * 60000).format(1)", "f(*x)", "cycler(*x)", "dict(x)",
    "[x]|string", "[x, x]|tojson", "x < x[1:]", "x[::-1]", "x * 3", "x in [x ~ 'a']",
    "range(99999)|list|sort(attribute='real,imag')", "range(99999)|map('string')|batch(1)|sort",
    "range(30000)|map('string')|map('reverse')|batch(1)|batch(1)|batch(1)|list|sort",
    "dict(range(70000)|map('string')|batch(2)|list)|tojson(sort_keys=true)",
    "range(0, 99999 * 2305843009213693951, 2305843009213693951) - {}.keys()", "2 ** 4095 * 9",
)  # fmt: skip
# Statements that jinja turns into many lines of Python, or finds constants in.
UNITS = ("{{a}}", "x{{a}}", "{%if a%}x{%endif%}", "{%set a=1%}", "{{a()}}", "{{['a'] * 99999}}",
         "{%for a in b%}x{%endfor%}", "{%macro a()%}{%endmacro%}", "{# #}", "{{a|e}}")  # fmt: skip


def hostile_chat(rng: random.Random) -> tuple[bytes, str]:
    """The body of a chat request, and its name."""
    name = rng.choice(list(MAKERS))
    fields = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
    return json.dumps({**fields, **MAKERS[name](rng)}).encode(), name


def crafted_pairs(count: int, target: int = 12345678901234567) -> list[tuple[int, int]]:
    """Pairs of numbers that have one hash as tuples, by the formula of CPython's tuplehash."""
    first, second, start, bits = 11400714785074694791, 14029467366897019727, 2870177450012600261, 64
    inverse = pow(second, -1, 2**bits)
    pairs: list[tuple[int, int]] = []
    one = 0
    while len(pairs) < count:
        one += 1
        mixed = (start + one * second) % 2**bits
        mixed = ((mixed << 31 | mixed >> 33) * first) % 2**bits
        other = (target - mixed) * inverse % 2**bits
        if other < HASH_MODULUS:
            pairs.append((one, other))
    return pairs


def _source(text: str) -> dict[str, Any]:
    return {"chat_template": text}


def _of_text(rng: random.Random) -> dict[str, Any]:
    """A method, a filter or an operator with all the text that a value may be."""
    unit = rng.choice(TEXTS)
    num_units = int(_LARGE_CHARS * rng.choice([0.01, 0.25, 1]))
    forms = [f"x.{rng.choice(METHODS)}", f"x|{rng.choice(FILTERS)}", rng.choice(EXPRESSIONS)]
    macro = "{% macro f() %}{% endmacro %}"
    return _source(
        f"{macro}{{% set x = '{unit}' * {num_units} %}}{{% set y = {rng.choice(forms)} %}}"
    )


def _keys(rng: random.Random) -> dict[str, Any]:
    """Keys that all have one hash, wherever a dict or a set is made."""
    pairs = crafted_pairs(rng.choice([100, 1500]), rng.randrange(2**60))
    listed = ",".join(map(str, pairs))
    numbers = ",".join(f"{i * HASH_MODULUS}:0" for i in range(len(pairs)))
    step = rng.randrange(2**60)
    complexes = (
        "{% set j = (-1) ** 0.5 %}{% set ns = namespace(l=[]) %}{% for i in range(1, 1500) %}"
        f"{{% set ns.l = ns.l + [{9 * 10**9 + step % 10**9} - 1000003 * i + j * i] %}}"
        "{% endfor %}{% set y = dict((ns.l + ns.l)|batch(2)) %}"
    )
    return _source(
        rng.choice(
            [
                "{% set y = {" + numbers + "} %}",
                "{% set y = {" + ",".join(f"{pair}:0" for pair in pairs) + "} %}",
                "{% set y = dict([" + listed + "]|batch(2)) %}",
                "{% set y = {"
                + listed[1:-1].replace("),(", ",").replace(", ", ":")
                + "}.items() - [] %}",
                "{% set y = [" + listed + "] - {}.items() %}",
                complexes,
            ]
        )
    )


def _code(rng: random.Random) -> dict[str, Any]:
    """As much of one statement as a template holds: it is compiled, whatever it would print."""
    unit = rng.choice(UNITS)
    return _source(unit * (MAX_SOURCE_CHARS // len(unit)))


def _message(rng: random.Random) -> dict[str, Any]:
    """Text that the model's own template strips, joins or searches."""
    unit = rng.choice(["\n", " ", "\x00", "\u2028", "{{ 7 * 7 }}", "<think>", "</think>", "\ufdd0"])
    num_units = int(MAX_CHARS * rng.choice([0.001, 0.05, 0.9])) // len(unit)
    message: dict[str, Any] = {"role": rng.choice(["user", "assistant", "system"])}
    message[rng.choice(["content", "content", "reasoning_content"])] = unit * num_units
    fields: dict[str, Any] = {"messages": [message, {"role": "user", "content": "x"}]}
    if rng.random() < 0.2:
        fields = {"messages": fields["messages"][:1], "continue_final_message": True}
        fields["add_generation_prompt"] = False
    return fields


def _kwargs(rng: random.Random) -> dict[str, Any]:
    """Variables for the model's own template: names that it or jinja uses, and odd values."""
    names = ["tools", "messages", "loop", "range", "namespace", "bos_token", "__class__", "self",
             "pyserve tick", "enable_thinking", "message", "caller", "x", ""]  # fmt: skip
    values: list[Any] = [
        "x" * 60_000, "{{ 7 * 7 }}", [[]] * 20_000, {f"k{i}": i for i in range(7000)}, 2**62, None,
        [1.5e308] * 9000, _nested(15), _nested(900), {"items": 1, "keys": 2, "function": {}}, -1,
    ]  # fmt: skip
    return {"chat_template_kwargs": {name: rng.choice(values) for name in rng.sample(names, 2)}}


def _nested(depth: int) -> Any:
    value: Any = {}
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


MAKERS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "template of text": _of_text,
    "template with keys of one hash": _keys,
    "template of much code": _code,
    "messages": _message,
    "kwargs": _kwargs,
}
