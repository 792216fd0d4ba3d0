from __future__ import annotations

import json
import random

import pytest

from pyserve.text.tool_parsers.json_text import read_value
from pyserve.text.tool_parsers.source import Fault, Source
from pyserve.text.tool_parsers.values import MAX_SCALAR_CHARS


def read(text: str, *, size: int | None = None) -> tuple[str, str]:
    """What comes out of a value, and the text that is left behind it."""
    source = Source()
    pieces: list[str] = []
    reading = read_value(source, pieces.append)
    size = size or max(1, len(text))
    for start in range(0, len(text), size):
        source.feed(text[start : start + size])
        if next(reading, "done") == "done":
            rest = source.text[source.position :] + text[start + size :]
            return "".join(pieces), rest
    source.is_ended = True
    next(reading)
    raise AssertionError("reads on behind the end")


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_values_pass_as_they_are_written(size: int | None) -> None:
    rng = random.Random(3)

    def value(depth: int) -> object:
        scalars = [None, True, rng.randint(-9, 10**12), rng.random() * 1e-9, 'a"\\\n\u2028é😀/', ""]
        if depth and rng.random() < 0.5:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        if depth and rng.random() < 0.7:
            return {str(rng.choice(scalars)): value(depth - 1) for _ in range(rng.randint(0, 3))}
        return rng.choice(scalars)

    for _ in range(150):
        text = json.dumps([value(4)], ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
        assert read(text + "} x", size=size) == (text, "} x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"a\nb\x00"', '"a\\nb\\u0000"'),
        (r'"\d \u12g \uD83D"', r'"\\d \\u12g \uD83D"'),
        (r'"it\'s"', '"it\'s"'),
    ],
)
def test_strings_are_mended(text: str, expected: str) -> None:
    assert read(text + ",") == (expected, ",")
    json.loads(expected)


@pytest.mark.parametrize(
    "text",
    ["tru ", "01 ", "1. ", "-", "+1 ", "NaN ", "'a'", "[1,]", '{"a":1,}', "{a: 1}", "[1 2]",
     '{"a"}', '{"a": }', "[,]", "}", "", '"a', "[1", '{"a":', '"\\', '"\\u12',
     "1" * (MAX_SCALAR_CHARS + 1) + " ", "[" * 100_000],
)  # fmt: skip
def test_what_is_not_json_is_a_fault(text: str) -> None:
    for size in (1, None):
        with pytest.raises(Fault):
            read(text, size=size)
