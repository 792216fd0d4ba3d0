"""Schemas, patterns, grammars and tools that are legal and meant to hurt: deep, wide, endless.

Each is answered, with a result or a 400 that says what is too much of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Extract: John Smith, 30 years old, software engineer"}]


def hostile_grammar(rng: random.Random) -> tuple[str, bytes, str]:
    """Path, body and name of a request for structured output or with tools."""
    name = rng.choice(list(MAKERS))
    size = rng.choice([3, 30, 300, 3000])
    path, fields = MAKERS[name](rng, size)
    fields |= {"max_tokens": rng.choice([1, 20, 60]), "stream": rng.random() < 0.4}
    fields |= {"temperature": rng.choice([0, 1])}
    if path == CHAT:
        fields["messages"] = MESSAGES
    else:
        fields["prompt"] = rng.choice(["x", ["x", "y"]])
    return path, json.dumps(fields).encode(), f"{name}, {size}"


Request = tuple[str, dict[str, Any]]


def _schema(rng: random.Random, size: int) -> Request:
    schema = SCHEMAS[rng.choice(list(SCHEMAS))](size)
    kind = rng.randrange(3)
    if kind == 0:
        wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return CHAT, {"response_format": wrapped}
    if kind == 1:
        return rng.choice([CHAT, COMPLETIONS]), {"structured_outputs": {"json": schema}}
    return rng.choice([CHAT, COMPLETIONS]), {"guided_json": schema}


def _nested(keyword: str, size: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(min(size, 300)):  # json.dumps goes no deeper than some 450
        schema = {"type": "array", "items": schema} if keyword == "items" else {keyword: [schema]}
    return schema


SCHEMAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "deep arrays": lambda size: _nested("items", size),
    "deep anyOf": lambda size: _nested("anyOf", size),
    "allOf of patterns": lambda size: {
        "allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(min(size, 40))]
    },
    "enum": lambda size: {"enum": [f"value {i}" for i in range(size * 10)]},
    "properties": lambda size: {
        "type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(size)},
        "required": [f"p{i}" for i in range(size)],
    },
    "itself": lambda size: {"$ref": "#"},
    "tree": lambda size: {
        "$ref": "#/$defs/t",
        "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": size}},
    },
    "chain": lambda size: {
        "$ref": "#/$defs/0",
        "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(size)}
        | {str(size): {"type": "null"}},
    },
    "pattern": lambda size: {"type": "string", "pattern": "(a|b|ab)*" * size},
    "repeats": lambda size: {"type": "string", "minLength": size * 100, "maxLength": size * 1000},
    "items": lambda size: {"type": "array", "minItems": size, "maxItems": size * 1000},
    "numbers": lambda size: {"type": "number", "multipleOf": 10.0**-size if size < 300 else 7},
    "NUL": lambda size: {"const": "\0" * size},
}  # fmt: skip


def _regex(rng: random.Random, size: int) -> Request:
    pattern = rng.choice(
        ["(a+)+$", "(.*)*x", f"a{{{size}}}", f"(a{{{size}}}){{{size}}}", "(a|aa)+b" * size,
         "[" + "".join(map(chr, range(0x100, 0x100 + size))) + "]*", "." * size, "(" * size,
         f"[^x]{{0,{size}}}y", "\\p{L}*", "\0" * size, "(?i)" + "x" * size]
    )  # fmt: skip
    field = rng.choice(["guided_regex", "structured_outputs"])
    value: Any = pattern if field == "guided_regex" else {"regex": pattern}
    return rng.choice([CHAT, COMPLETIONS]), {field: value}


def _choice(rng: random.Random, size: int) -> Request:
    unit = rng.choice(["x", "漢", "\U0001f9ff", "<|im_end|>", "\0"])
    return COMPLETIONS, {"guided_choice": [unit * (i % 50 + 1) + str(i) for i in range(size * 3)]}


def _ebnf(rng: random.Random, size: int) -> Request:
    grammar = rng.choice(
        ["root ::= root root | \"a\"", "root ::= " + " | ".join(f'"{i}"' for i in range(size)),
         "start: start", "start: a+\na: /x*/", 'start: "a"~1..' + str(size * 1000),
         "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(size)),
                    f'r{size}: "a"'])]
    )  # fmt: skip
    return rng.choice([CHAT, COMPLETIONS]), {"guided_grammar": grammar}


def _tools(rng: random.Random, size: int) -> Request:
    schema = SCHEMAS[rng.choice(list(SCHEMAS))](min(size, 300))
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": schema if i == 0 else {}}}
        for i in range(rng.choice([1, size * 3]))
    ]
    named = {"type": "function", "function": {"name": "f0"}}
    return CHAT, {"tools": tools, "tool_choice": rng.choice(["auto", "required", "none", named])}


MAKERS: dict[str, Callable[[random.Random, int], Request]] = {
    "schema": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _ebnf,
    "tools": _tools,
}
