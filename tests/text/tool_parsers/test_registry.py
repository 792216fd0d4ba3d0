"""Every format: what is found in an answer, however it was cut."""

from __future__ import annotations

import json
import random
import time

import pytest

from pyserve.text.parts import Content, ToolCall, content_of, tool_calls_of
from pyserve.text.tool_parsers.registry import NAMES, literals, make_parser
from pyserve.text.tool_parsers.source import MAX_HELD_CHARS
from pyserve.text.tool_parsers.stage import MAX_CALLS, MAX_WHITE_CHARS, Tools
from tests.text.tool_parsers.answers import (
    ANSWERS,
    PARAMETERS,
    PARIS,
    TEXTS,
    WEATHER,
    Answer,
    deepseek,
    every_cut,
    found_in,
    hermes,
    parts_of,
    qwen,
    some_cuts,
)

CUT_CHARS = 6  # 64 ways


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: f"{a.parser}-{a.text[:24]}")
def test_finds_the_calls(answer: Answer) -> None:
    content, calls = found_in(answer.parser, [answer.text])
    assert (content, tuple(calls)) == (answer.content, answer.calls)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("parser", "text"), TEXTS)
def test_what_is_no_call_is_content(parser: str, text: str) -> None:
    assert found_in(parser, [text]) == (text, [])


def test_every_parser_has_answers_and_texts() -> None:
    assert {answer.parser for answer in ANSWERS} == set(NAMES)
    assert {parser for parser, _ in TEXTS} == set(NAMES)


@pytest.mark.parametrize("parser", NAMES)
def test_the_cut_does_not_matter(parser: str) -> None:
    texts = [a.text for a in ANSWERS if a.parser == parser]
    texts += [text for name, text in TEXTS if name == parser]
    for seed, text in enumerate(texts):
        whole = found_in(parser, [text])
        assert found_in(parser, list(text)) == whole, text
        for pieces in some_cuts(text, 60, seed):
            assert found_in(parser, pieces) == whole, pieces


@pytest.mark.parametrize("parser", NAMES)
def test_every_cut_of_short_texts(parser: str) -> None:
    """Around the places where something begins or ends, in all 64 ways."""
    texts = [a.text for a in ANSWERS if a.parser == parser][:4]
    texts += [text for name, text in TEXTS if name == parser][:2]
    for text in texts:
        whole = found_in(parser, [text])
        for start in {0, max(0, len(text) // 2 - CUT_CHARS), max(0, len(text) - CUT_CHARS)}:
            for pieces in every_cut(text[start:], CUT_CHARS):
                found = found_in(parser, [text[:start], *pieces])
                assert found == whole, (text, start, pieces)


@pytest.mark.parametrize("parser", NAMES)
def test_truncated_anywhere(parser: str) -> None:
    """No text is lost and nothing is raised where an answer ends too early, or goes wrong."""
    for answer in ANSWERS:
        if answer.parser != parser:
            continue
        for end in range(len(answer.text)):
            for tail in ("", '#"]'[end % 3]):  # lengths of what goes before are of any remainder
                text = answer.text[:end] + tail
                whole = found_in(parser, [text])
                assert found_in(parser, list(text)) == whole, text
                content, calls = whole
                assert len(calls) <= len(answer.calls)
                if not calls:  # white space beside what was to be a call stays too
                    assert content == text


@pytest.mark.parametrize("parser", NAMES)
def test_random_texts_of_markup(parser: str) -> None:
    rng = random.Random(parser)
    atoms = [
        *literals(parser), '{"name": "now", ', '"arguments": ', '"id": "x"', "now", "get_weather",
        "{", "}", "[", "]", "(", ")", '"', "'", ",", ":", " ", "\n", "\\", "=", ">", "a", "1",
        "null", "<parameter=city>", "</parameter>", "</function>", "city=", WEATHER, "{}", ";",
    ]  # fmt: skip
    for seed in range(400):
        text = "".join(rng.choices(atoms, k=rng.randint(1, 25)))
        whole = found_in(parser, [text])
        assert found_in(parser, list(text)) == whole, text
        for pieces in some_cuts(text, 4, seed):
            assert found_in(parser, pieces) == whole, pieces


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", hermes(PARIS)),
        ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{WEATHER}"),
        ("deepseek_v3", deepseek(PARIS)),
        ("qwen3_coder", qwen("get_weather", city="Paris", days="2")),
        ("pythonic", '[get_weather(city="Paris", days=2)]'),
    ],
)
def test_arguments_come_as_they_are_written(parser: str, text: str) -> None:
    """The name comes before the arguments are complete, and these in pieces."""
    *pushed, end = parts_of(parser, list(text))
    calls = [part for some in pushed for part in some if isinstance(part, ToolCall)]
    assert not end
    assert calls[0].name == "get_weather"
    assert len([call for call in calls if call.arguments]) > 8
    so_far = text[: next(i for i, some in enumerate(pushed) if some)]
    assert "Paris" not in so_far


def test_ids() -> None:
    def ids(parser: str, text: str) -> list[str | None]:
        parts = [part for some in parts_of(parser, [text]) for part in some]
        return [call.id for call in tool_calls_of(parts)]

    mistral = "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]now[ARGS]{}"
    given, made = ids("mistral", mistral)
    assert given == "abcdefghi"
    assert made is not None and len(made) == 9 and made.isalnum()
    assert ids("mistral", '[TOOL_CALLS][{"id": "x1", "name": "now", "arguments": {}}]') == ["x1"]
    assert ids("mistral", '[TOOL_CALLS][{"id": "\\n", "name": "now", "arguments": {}}]') != ["\n"]
    (made,) = ids("hermes", hermes(PARIS))
    assert made is not None and made.startswith("chatcmpl-tool-")


def test_further_calls_are_dropped() -> None:
    text = f"a {hermes(PARIS, ('now', '{}'))} b"
    assert found_in("hermes", [text], max_calls=1) == ("a b", [PARIS])


def test_calls_are_bounded() -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    content, calls = found_in("hermes", [call * (MAX_CALLS + 2)])
    assert len(calls) == MAX_CALLS
    assert content == call * 2


@pytest.mark.parametrize("size", [1, 997, 10**9])
def test_held_text_is_bounded(size: int) -> None:
    """What begins as a call and never becomes one is content before it has all come."""
    text = '<tool_call>{"arguments": {"a": "' + "x" * (2 * MAX_HELD_CHARS)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    stage = make_parser("hermes", Tools())
    parts = [part for piece in pieces for part in stage.push(Content(piece))]
    assert content_of(parts) == text
    assert not stage.flush()


@pytest.mark.parametrize("size", [1, 100, 10**9])
def test_white_space_is_held_for_a_while_only(size: int) -> None:
    for count in (0, 1, MAX_WHITE_CHARS, 2 * MAX_WHITE_CHARS + 7):
        text = "a" + "\n" * count + hermes(PARIS)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        content, calls = found_in("hermes", pieces)
        assert calls == [PARIS]
        assert content == "a" + "\n" * (count // MAX_WHITE_CHARS * MAX_WHITE_CHARS)


def test_nesting_is_bounded() -> None:
    for depth, is_call in ((60, True), (70, False), (100_000, False)):
        value = "[" * depth + "]" * depth
        text = f'<tool_call>{{"name": "now", "arguments": {{"a": {value}}}}}</tool_call>'
        content, calls = found_in("hermes", [text])
        assert (content == "") is is_call
        assert len(calls) == 1  # it had begun


def test_tokens_come_once_and_in_order() -> None:
    text = f"Look: {hermes(PARIS)} done"
    stage = make_parser("hermes", Tools())
    parts = [p for i, char in enumerate(text) for p in stage.push(Content(char, (i,)))]
    parts += stage.flush()
    assert [token for part in parts for token in part.tokens] == list(range(len(text)))
    of_call = [t for part in parts if isinstance(part, ToolCall) for t in part.tokens]
    assert text.index("{") in of_call and text.index("Look") not in of_call
    assert all(part.tokens and part != Content("", part.tokens) for part in parts)
    assert content_of(parts) == "Look: done"


@pytest.mark.parametrize("parser", NAMES)
def test_hostile_texts_take_linear_time(parser: str) -> None:
    begins = make_parser(parser, Tools()).begins
    for text in (begins[0] * 20_000, f'{begins[0]}{{"x": [' * 8_000, "<" * 100_000, " " * 200_000):
        began = time.process_time()
        for size in (7, len(text)):
            stage = make_parser(parser, Tools(parameters=PARAMETERS))
            parts = [
                part
                for i in range(0, len(text), size)
                for part in stage.push(Content(text[i : i + size]))
            ]
            assert content_of([*parts, *stage.flush()]) == text
        assert time.process_time() - began < 4.0
