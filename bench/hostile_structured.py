"""Hostile structured outputs, tools and masks: schemas, patterns and grammars that would blow up.

Each is answered by a result or a 400, within seconds, and nobody else feels it. What is asked for
is a few tokens long: what is long here is to find out which tokens those may be.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SIZES = (10, 60, 400, 1100, 5000)
DATE = {"type": "string", "format": "date"}

PATTERNS = (
    "(a|a)*" * 50, "(a+)+$", "(a|b)*a(a|b){200}", ".*a.{1000}", "a{1000000}", "(a{100}){100}",
    "((a{10}){10}){10}{10}{10}", "a?" * 9999, "|".join(f"x{i}" for i in range(3300)), "(", "[", "*",
    "a{2,1}", "\\", "(?=a)b", r"(a)\1", "\x00+", r"\p{L}{50}", "[a-z]" * 9000, "^" * 5000 + "a",
    "(" * 90 + "a" + ")" * 90, "(" * 9000 + "a" + ")" * 9000, ".{0,19000}", "(.{0,100}x){0,100}",
    "(?i)" + "straße" * 500, "^$", r"[^\x00-\U0010FFFF]", "a^b", "a{١٢}", "(?!)", "a/b\n#c",
    "\\\nx", "(.*a.{12}){12}", "(a*)*(a*)*(a*)*b", r"\u12", r"\x{110000}", "[z-a]", "",
)  # fmt: skip
GRAMMARS = (
    "start: start", 'start: "a" start', "start: a*\na: a a", "start: ", "start: nope", "start: (",
    "start: <[999999999]>", 'start: a "b"\na[lazy]: /.*/', "root ::= " + '"a"? ' * 5000, "x",
    'start: %json {"const": NaN}', "start: %json " + "[" * 20_000, 'start: "\x00"',
    'start: %json {"const": "\\ud800"}', 'start: %json {"maxLength": 1' + "0" * 6000 + "}",
    "start: " + '("a"?)' * 8000, "start: " + '("a"?)' * 300, 'start: "' + "a" * 60_000 + '"',
    "start: " + " | ".join(f'"w{i}"' for i in range(5000)), "start: /.*a.*/ & /.*b.*/",
    "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(40)) + 'r40: "x"',
    "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(25)) + 'A25: "x"',
    "root ::= [a-z]{1,100000}", 'root ::= ("a"?)*', "%llguidance {", 'start[stop="x"]: /.*/',
)  # fmt: skip
# Schemas whose keywords have values of a wrong type or none that could be kept to.
ODD: tuple[Any, ...] = (
    {"format": "date", "type": 5}, {"type": [["a"]]}, {"required": [{}]}, {"enum": []}, {"$ref": 5},
    {"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}, {"$ref": "#/anyOf/-1", "anyOf": [{}]}, {"not": {}},
    {"minLength": -1}, {"multipleOf": 0}, {"const": "x" * 200_000}, {"enum": [1e308]}, False, [], 1,
    {"properties": []}, {"properties": {"k" * 100_000: {"pattern": "("}}}, {"$id": 5, "$ref": "5#"},
    {"$ref": "#/$defs/" + "a" * 100_000}, {"items": [DATE], "additionalItems": 5}, "x", None,
    {"type": "object", "properties": {'a\x00b"\n': {}}, "required": ['a\x00b"\n']}, {"$defs": 1},
)  # fmt: skip


def hostile_structure(rng: random.Random) -> tuple[str, bytes, str, tuple[int, ...]]:
    """Path, body, name, and the statuses that the answer may have."""
    name = rng.choice(list(MAKERS))
    fields, is_refused = MAKERS[name](rng)
    path = CHAT if "tools" in fields or "tool_choice" in fields else rng.choice([CHAT, COMPLETIONS])
    prompt: Fields = {"prompt": "x"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "Hello!"}]}
    body: Fields = {**prompt, "max_tokens": rng.choice([1, 3, 8]), **fields}
    if rng.random() < 0.3:
        body["stream"] = True
    # 503: earlier grammars still compile; 429: others' requests wait.
    wanted = (400, 429, 503) if is_refused else (200, 400, 429, 503)
    return path, json.dumps(body).encode(), name, wanted


def _asked(rng: random.Random, schema: object) -> Fields:
    """A field that asks for a schema."""
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    named = {"type": "function", "function": {"name": "f"}}
    choice = rng.choice(["auto", "required", named])
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return rng.choice([
        {"response_format": format_},
        {"guided_json": schema}, {"structured_outputs": {"json": schema}},
        {"tools": [tool], "tool_choice": choice}, {"tools": [tool], "tool_choice": choice},
    ])  # fmt: skip


def _nested(rng: random.Random) -> tuple[Fields, bool]:
    schema: Any = {"type": "string"}
    for _ in range(rng.choice([10, 40, 70, 200])):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return _asked(rng, schema), False


def _chain(rng: random.Random) -> tuple[Fields, bool]:
    """References that lead to each other, once or twice at each step."""
    length, width = rng.choice(SIZES), rng.choice([1, 2])
    keyword = rng.choice(["anyOf", "allOf", "oneOf", "properties", "$ref"])
    definitions: dict[str, Any] = {f"d{length}": {"type": "string"}}
    for i in range(length):
        inner = [{"$ref": f"#/$defs/d{i + 1}"}] * width
        named = {f"p{index}": one for index, one in enumerate(inner)}
        made: dict[str, Any] = {"properties": {"type": "object", "properties": named},
                                "$ref": inner[0]}  # fmt: skip
        definitions[f"d{i}"] = made.get(keyword, {keyword: inner})
    return _asked(rng, {"$ref": "#/$defs/d0", "$defs": definitions}), False


def _enum(rng: random.Random) -> tuple[Fields, bool]:
    count = rng.choice([100, 5000, 19_000, 30_000])
    values: list[Any] = rng.choice([
        [f"v{i}" for i in range(count)], list(range(count)), [{"a": i} for i in range(count // 8)],
        ["x" * 100_000 + str(i) for i in range(2)],
    ])  # fmt: skip
    if rng.random() < 0.3:
        return {"guided_choice": list(map(str, values))}, False
    return _asked(rng, {"enum": values}), False


def _meeting(rng: random.Random) -> tuple[Fields, bool]:
    count = rng.choice([2, 12, 13, 200])
    pattern = rng.choice(["a.*b{}", "(a|b)*a(a|b){{{}}}", "{}", ".*{}.*"])
    kind = rng.choice(["allOf", "patternProperties"])
    texts = [pattern.format(i) for i in range(count)]
    if kind == "allOf":
        return _asked(rng, {"allOf": [{"type": "string", "pattern": one} for one in texts]}), False
    return _asked(rng, {"type": "object", kind: {one: {} for one in texts}}), False


def _product(rng: random.Random) -> tuple[Fields, bool]:
    """A few choices of each of many, which the engine would multiply out."""
    lengths = [{"anyOf": [{"minLength": i}, {"maxLength": 50 + i}]} for i in range(30)]
    objects = [{"anyOf": [{"required": [f"p{i}_{j}"]} for j in range(4)]} for i in range(12)]
    kind, branches = rng.choice([("string", lengths), ("object", objects)])
    return _asked(rng, {"type": kind, "allOf": branches}), False


def _wide(rng: random.Random) -> tuple[Fields, bool]:
    names = [f"p{i}" for i in range(rng.choice([100, 399, 1999, 5000]))]
    properties = dict.fromkeys(names, {"type": "integer"})
    needed = names if rng.random() < 0.5 else []
    return _asked(rng, {"type": "object", "properties": properties, "required": needed}), False


def _odd(rng: random.Random) -> tuple[Fields, bool]:
    return _asked(rng, rng.choice(ODD)), False


def _pattern(rng: random.Random) -> tuple[Fields, bool]:
    pattern = rng.choice(PATTERNS)
    if rng.random() < 0.4:
        return _asked(rng, {"type": "string", "pattern": pattern}), False
    return rng.choice(
        [{"guided_regex": pattern}, {"structured_outputs": {"regex": pattern}}]
    ), False


def _grammar(rng: random.Random) -> tuple[Fields, bool]:
    return {
        "guided_grammar": rng.choice(GRAMMARS),
        "n": rng.choice([1, 8]),
        "temperature": 1,
    }, False


def _tags(rng: random.Random) -> tuple[Fields, bool]:
    """Structural tags, each with something that cannot be meant."""
    structure: Fields = {"begin": "<a>", "schema": {"type": "object"}, "end": "</a>"}
    deep: Any = {"type": "any_text"}
    for _ in range(rng.choice([20, 400])):
        deep = {"type": "sequence", "elements": [deep]}
    triggered = {"type": "triggered_tags", "triggers": ["<a"], "tags": [structure]}
    kinds: list[Fields] = [
        *({"structures": [structure], "triggers": triggers}
          for triggers in ([""], [], [1], ["<a", "<a"], ["<a", "<"], None)),
        {"structures": [], "triggers": ["<a"]}, {"structures": [{**structure, "x": 1}],
                                                 "triggers": ["<a"]},
        {"format": deep}, {"format": {}}, {"format": {"type": "any_text", "excludes": ["x"]}},
        {"format": triggered}, {"format": {"type": "any_text"}, "structures": [structure]},
    ]  # fmt: skip
    return {"response_format": {"type": "structural_tag", **rng.choice(kinds)}}, True


def _tools(rng: random.Random) -> tuple[Fields, bool]:
    names = rng.choice([
        [f"t{i}" for i in range(rng.choice([100, 1024, 1025, 10_000]))],
        ["a"] * 2, ['a"b'], ["a\nb"], [""], ["x" * 100_000], ["\x00"], ["{{x}}"],
    ])  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}}
             for name in names]  # fmt: skip
    is_refused = len(names) < 100 or len(names) > 1024
    return {"tools": tools, "tool_choice": rng.choice(["auto", "required"])}, is_refused


def _contradiction(rng: random.Random) -> tuple[Fields, bool]:
    schema = {"json_schema": {"name": "x", "schema": {"type": "string"}}}
    return rng.choice([
        {"guided_regex": "a", "guided_choice": ["a"]}, {"structured_outputs": {}},
        {"structured_outputs": {"json": {}, "regex": "a"}}, {"guided_choice": []},
        {"response_format": {"type": "text", **schema}},
        {"response_format": {"type": "json_object", **schema}},
        {"allowed_token_ids": []}, {"allowed_token_ids": [-1]}, {"bad_words": [""]},
        {"bad_words": ["x"] * 1000}, {"bad_words": ["x" * 10_000]}, {"tool_choice": "required"},
    ]), True  # fmt: skip


def _masks(rng: random.Random) -> tuple[Fields, bool]:
    """Legal ones that leave little: nothing may be left, which ends the answer alone."""
    return rng.choice([
        {"allowed_token_ids": [rng.randrange(200)], "ignore_eos": True},
        {"allowed_token_ids": [100], "guided_json": {"type": "object"}},
        {"allowed_token_ids": [100], "logit_bias": {"100": -100}},
        {"bad_words": [chr(code) for code in range(33, 127)]},
        {"bad_words": ["yes", "y", "ye", "e", "s", "es"], "guided_choice": ["yes"]},
        {"guided_regex": "[ab]{3}", "min_tokens": 8, "max_tokens": 8, "ignore_eos": True},
        {"guided_choice": ["yes"], "stop": ["e"], "include_stop_str_in_output": True},
        {"guided_json": {"type": "object"}, "n": 64, "temperature": 1},
    ]), False  # fmt: skip


MAKERS: dict[str, Callable[[random.Random], tuple[Fields, bool]]] = {
    "schemas within schemas": _nested,
    "a chain of references": _chain,
    "an enum": _enum,
    "patterns that meet": _meeting,
    "a product": _product,
    "properties": _wide,
    "an odd schema": _odd,
    "a pattern": _pattern,
    "a grammar": _grammar,
    "structural tags": _tags,
    "tools": _tools,
    "a contradiction": _contradiction,
    "masks": _masks,
}
