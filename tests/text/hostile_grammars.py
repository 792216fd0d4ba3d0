"""Specs that are meant to hurt: run in a process of its own by test_grammar_hostile.py."""

from __future__ import annotations

import json
import random
import resource
import string
import sys
import time
from collections.abc import Callable
from typing import Any

from pyserve.errors import RequestError
from pyserve.text.grammar import (
    Choice,
    Grammar,
    GrammarCache,
    JsonSchema,
    Regex,
    Spec,
    Tags,
    compile_grammar,
)
from tests.text.grammars import allowed, vocabulary

MAX_TOKENS = 24


def schema(value: Any) -> Spec:
    return JsonSchema(param="s", schema=value)


def nested(depth: int, keyword: str) -> Any:
    inner: Any = {"type": "string"}
    for _ in range(depth):
        wrapped: dict[str, Any] = {
            "items": {"type": "array", "items": inner},
            "properties": {"type": "object", "properties": {"a": inner}, "required": ["a"]},
            "anyOf": {"anyOf": [inner, {"type": "null"}]},
            "allOf": {"allOf": [inner]},
        }
        inner = wrapped[keyword]
    return inner


def chain(length: int, keyword: str) -> Any:
    """Definitions each of which leads to the next."""
    definitions: dict[str, Any] = {f"d{length}": {"type": "boolean"}}
    for number in range(length):
        reference = {"$ref": f"#/$defs/d{number + 1}"}
        definitions[f"d{number}"] = {
            "ref": reference,
            "items": {"type": "array", "items": reference},
            "properties": {"type": "object", "properties": {"a": reference}, "required": ["a"]},
            "anyOf": {"anyOf": [reference, {"type": "null"}]},
            "allOf": {"allOf": [reference, {"type": "boolean"}]},
        }[keyword]
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def laughs(keyword: str, length: int) -> Any:
    """Each definition holds the next one twice."""
    definitions: dict[str, Any] = {f"d{length}": {"type": "string", "pattern": "a"}}
    for number in range(length):
        definitions[f"d{number}"] = {keyword: [{"$ref": f"#/$defs/d{number + 1}"}] * 2}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def product(rng: random.Random, width: int) -> Any:
    """Unions that are intersected with one another."""
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"p{rng.randrange(9)}": {"maxLength": rng.randrange(9)}}}
                       for _ in range(width)]}
            for _ in range(width)
        ]
    }  # fmt: skip


def patterns(rng: random.Random, count: int) -> list[str]:
    kinds = [
        lambda: f".*[{rng.choice(string.ascii_letters)}].*",
        lambda: f"(a|b)*a(a|b){{{rng.randrange(2, 40)}}}",
        lambda: f"^(\\w+\\s){{{rng.randrange(1, 60)},{rng.randrange(60, 900)}}}$",
        lambda: "(" + "|".join(f"w{rng.randrange(10**6)}" for _ in range(200)) + ")+",
        lambda: f"(x+x+)+y{{{rng.randrange(9)}}}",
        lambda: f"(\\p{{L}}+\\p{{N}}*){{1,{rng.randrange(2, 900)}}}",
        lambda: f"(a?){{{rng.randrange(2, 5000)}}}a{{{rng.randrange(2, 5000)}}}",
        lambda: "(?i)" + "".join(rng.choices(string.ascii_letters + "()[]{}*+?|.\\^$0", k=40)),
    ]
    return [rng.choice(kinds)() for _ in range(count)]


def makers(rng: random.Random) -> list[Callable[[], Spec]]:
    size = rng.choice([10, 100, 1000, 10_000])
    few = rng.randrange(2, 16)
    inner = rng.choice(["items", "properties", "anyOf", "allOf"])
    one = patterns(rng, 1)[0]
    return [
        lambda: schema(nested(rng.choice([3, 30, 64]), inner)),
        lambda: schema(nested(rng.choice([65, 300]), inner)),
        lambda: schema(chain(rng.choice([5, 300, 999, 1500]), rng.choice([inner, "ref"]))),
        lambda: schema(laughs(rng.choice(["allOf", "anyOf", "oneOf"]), rng.choice([5, 12, 30]))),
        lambda: schema(product(rng, few)),
        lambda: schema({"enum": [f"value {rng.randrange(10**9)}" for _ in range(size)]}),
        lambda: schema({"type": "object", "properties": {f"p{i}": {} for i in range(size)}}),
        lambda: schema({"type": "object", "properties": {f"p{i}": {} for i in range(size)},
                        "required": [f"p{i}" for i in range(size)]}),
        lambda: schema({"type": "string", "allOf": [{"pattern": p} for p in patterns(rng, few)]}),
        lambda: schema({"patternProperties": {p: {} for p in patterns(rng, few)}}),
        lambda: schema({"anyOf": [{"pattern": p} for p in patterns(rng, few)]}),
        lambda: schema({"pattern": one, "minLength": size, "maxLength": 10 * size}),
        lambda: schema({"type": "array", "minItems": size, "maxItems": 10_000, "items": {
            "type": "array", "minItems": size, "items": {"type": "integer"}}}),
        lambda: schema({"type": "integer", "multipleOf": rng.randrange(1, 20_000),
                        "minimum": -(10 ** rng.randrange(18)), "maximum": 10 ** rng.randrange(18)}),
        lambda: schema({"type": "number", "minimum": rng.random() * 10 ** rng.randrange(-12, 18)}),
        lambda: schema({"$ref": "#/properties/a", "properties": {"a": {"allOf": [{"$ref": "#"}]}}}),
        lambda: schema({"oneOf": [{"$ref": "#"}, {"type": "null"}]}),
        lambda: schema({"const": "\0" * size}),
        lambda: schema({"required": [f"r{i}" for i in range(size)]}),
        lambda: Regex(param="r", pattern=one),
        lambda: Regex(param="r", pattern="|".join(patterns(rng, few))),
        lambda: Regex(param="r", pattern="(" * size + "a" + ")" * size),
        lambda: Regex(param="r", pattern="".join(rng.choices(string.printable + "\0", k=20_000))),
        lambda: Regex(param="r", pattern=f"(.{{0,{size}}}a){{0,{size}}}"),
        lambda: Choice(param="c", texts=["x" * rng.randrange(40) for _ in range(size)]),
        lambda: Grammar(param="g", text="start: A\nA: " + " & ".join(f"/{p}/" for p in
                                                                     patterns(rng, few))),
        lambda: Grammar(param="g", text="start: A\nA: ~(/" + one + "/)"),
        lambda: Grammar(param="g", text="start: r0\n" + "".join(
            f"r{i}: r{i + 1} r{i + 1} | \n" for i in range(size // 5)) + f'r{size // 5}: "a"'),
        lambda: Grammar(param="g", text='start: start start | "a" |'),
        lambda: Grammar(param="g", text="root ::= " + "(" * (few * 6) + "[a-z]" + ")?" * (few * 6)),
        lambda: Grammar(param="g", text='start: x{1,999}\nx: y{1,999}\ny: z{1,999}\nz: "a"?'),
        lambda: Grammar(param="g", text='start: "a"\n' + "".join(
            rng.choices(string.printable, k=5000))),
        lambda: Tags(param="t", tags={"type": "triggered_tags", "triggers": ["<"], "tags": [
            {"begin": f"<{i}>", "end": "</>", "content": {"type": "regex", "pattern": p}}
            for i, p in enumerate(patterns(rng, few))]}),
    ]  # fmt: skip


def rss_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main(num_rounds: int) -> None:
    vocab = vocabulary()
    cache = GrammarCache() if len(sys.argv) < 3 else None
    counts = {"compiled": 0, "refused": 0, "ended": 0}
    slowest, slowest_fill, after = (0.0, ""), (0.0, ""), []
    for round_ in range(num_rounds):
        for number in range(len(makers(random.Random(0)))):
            rng = random.Random(f"{round_} {number}")
            spec = makers(rng)[number]()
            name = f"{round_}/{number} {str(spec)[:100]}"
            start = time.process_time()
            try:
                compiled = compile_grammar(spec, vocab, cache=cache)
            except RequestError as error:
                counts["refused"] += 1
                assert len(str(error)) < 1000, str(error)
                assert "\n" not in str(error), str(error)
                compiled = None
            slowest = max(slowest, (time.process_time() - start, name))
            if compiled is None:
                continue
            counts["compiled"] += 1
            constraint = compiled.constraint()
            for _ in range(MAX_TOKENS):
                start = time.process_time()
                choices = allowed(constraint, vocab)
                slowest_fill = max(slowest_fill, (time.process_time() - start, name))
                if constraint.error is not None or constraint.is_finished or not len(choices):
                    break
                constraint.accept([int(choices[rng.randrange(len(choices))])])
            counts["ended"] += constraint.error is not None
        after.append(rss_mib())
    print(
        json.dumps({**counts, "slowest_s": slowest, "slowest_fill_s": slowest_fill, "mib": after})
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
