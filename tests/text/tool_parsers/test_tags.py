"""Whatever a model writes that is held to a format by a grammar, the parser finds calls in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest

from pyserve.text.grammar import Tags, compile_grammar
from pyserve.text.grammar_constraint import FreeUntil
from pyserve.text.parts import Content, content_of, tool_calls_of
from pyserve.text.tool_parsers.json_formats import FORMATS
from pyserve.text.tool_parsers.pythonic import PythonicParser
from pyserve.text.tool_parsers.qwen3_coder import QwenCoderParser
from pyserve.text.tool_parsers.registry import NAMES, PLAIN_JSON, ToolFormat, make_parser
from pyserve.text.tool_parsers.stage import Tools
from pyserve.text.tool_parsers.tags import may_call, must_call, without_words
from pyserve.text.tool_parsers.written import Written
from tests.text.grammars import allowed, text_of, vocabulary

SCHEMAS: Mapping[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "now": {"properties": {}, "additionalProperties": False},
}
# What cannot be said in tags, a text of six characters at most, is not in these.
BARE_TEXTS: Mapping[str, dict[str, Any]] = {
    "get_weather": {
        **SCHEMAS["get_weather"],
        "properties": {
            **SCHEMAS["get_weather"]["properties"],
            "city": {"type": "string"},
            "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}]},
            "near": {"type": ["string", "null"]},
            "at": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        },
        "$defs": {"Unit": {"enum": ["celsius", "fahrenheit"], "type": "string", "title": "Unit"}},
    },
    "now": {"type": "object", "properties": {"utc": {"type": "boolean"}}},
}
FORMS = [(name, written) for name, row in FORMATS.items() for written in row.written]
FORMS += [("pythonic", PythonicParser.written[0]), ("qwen3_coder", QwenCoderParser.written[0])]
TRIGGERED = [(name, written) for name, written in FORMS if written.trigger]
BARE = [(name, written) for name, written in FORMS if written.bare]


def tags(value: dict[str, Any]) -> Tags:
    return Tags(param="tools", tags=value)


def schemas_of(written: Written) -> Mapping[str, dict[str, Any]]:
    return BARE_TEXTS if written.form == "tags" else SCHEMAS


def calls_in(name: str, text: str, schemas: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The content, and the calls, whose arguments are checked by their schemas."""
    parser = make_parser(name, Tools(parameters=schemas))
    parts = [*parser.push(Content(text)), *parser.flush()]
    calls = tool_calls_of(parts)
    for call in calls:
        assert call.name is not None
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    return content_of(parts), calls


@pytest.mark.parametrize("is_single", [False, True])
@pytest.mark.parametrize(("name", "written"), FORMS, ids=lambda v: v if isinstance(v, str) else "")
def test_calls_that_must_come(name: str, written: Written, is_single: bool) -> None:
    schemas = schemas_of(written)
    assert without_words(written, schemas) == {}
    spec = tags(must_call(written, schemas, is_single=is_single))
    counts = set()
    for seed in range(12):
        text = text_of(spec, seed, 400)
        if text is not None:
            content, calls = calls_in(name, text, schemas)
            assert content == "", text
            counts.add(len(calls))
    assert 0 not in counts and counts
    assert not is_single or counts == {1}


@pytest.mark.parametrize(
    ("name", "written"), TRIGGERED, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("is_triggered", [False, True])
def test_calls_that_may_come(name: str, written: Written, is_triggered: bool) -> None:
    """Text is free, and what begins as a call goes on as one."""
    vocab = vocabulary()
    free_until = FreeUntil(ends=(), next_ends=(written.trigger,)) if is_triggered else None
    schemas = schemas_of(written)
    compiled = compile_grammar(tags(may_call(written, schemas, is_single=False)), vocab)

    def play(text: str) -> Any:
        constraint = compiled.constraint(free_until=free_until)
        constraint.accept(vocab.tokenizer.encode_inner(text))
        return constraint

    ends = set(vocab.eos_token_ids)
    assert ends & set(allowed(play("Just {text}, [1]"), vocab))
    assert play("Just {text}, [1]").is_free is is_triggered
    begun = play("Well. " + written.trigger)
    assert begun.error is None and not begun.is_free and not ends & set(allowed(begun, vocab))
    arguments = '{"city": "Paris", "days": 2}'

    def said(arguments: str) -> str:
        return "Well. " + written.text([("get_weather", arguments)])

    whole = play(said(arguments))
    assert whole.error is None and ends & set(allowed(whole, vocab))
    assert [one.arguments for one in calls_in(name, said(arguments), schemas)[1]] == [arguments]
    again = play(f"{said(arguments)} And {said(arguments)}")
    assert again.error is None and ends & set(allowed(again, vocab))
    for wrong in ('{"city": "Paris", "days": 9}', '{"days": "2"}'):
        assert play(said(wrong)).error is not None


@pytest.mark.parametrize(("name", "written"), BARE, ids=lambda v: v if isinstance(v, str) else "")
def test_calls_that_are_told_by_how_the_answer_begins(name: str, written: Written) -> None:
    vocab = vocabulary()
    compiled = compile_grammar(tags(may_call(written, SCHEMAS, is_single=False)), vocab)

    def play(text: str) -> tuple[bool, bool]:
        """Whether the text is allowed, and may be all."""
        constraint = compiled.constraint()
        constraint.accept(vocab.tokenizer.encode_inner(text))
        if constraint.error is not None:
            return False, False
        ends = set(vocab.eos_token_ids)
        return True, constraint.is_finished or bool(ends & set(allowed(constraint, vocab)))

    for text in ("", "No.", " \n", "\n\nNo {x} [y]", f"No {written.bare}"):
        assert play(text) == (True, True), text
        assert calls_in(name, text, SCHEMAS) == (text, [])
    assert play(written.bare) == (True, False)
    call = ("get_weather", '{"city": "Paris", "days": 2}')
    for calls in ([call], [call, ("now", "{}"), call]):
        text = written.text(calls)
        assert play(text) == (True, True)
        content, found = calls_in(name, text, SCHEMAS)
        assert content == "" and [(c.name, json.loads(c.arguments)) for c in found] == [
            (name, json.loads(arguments)) for name, arguments in calls
        ]
    for wrong in ('{"city": "Paris", "days": 9}', '{"days": 2}', '{"town": "x"}'):
        assert play(written.text([("get_weather", wrong)])) == (False, False)
    assert play(written.text([("other", "{}")])) == (False, False)
    assert play(" " + written.bare) == (False, False)


def test_the_form_is_one_whose_marks_are_tokens() -> None:
    class With:
        special_token_ids: frozenset[int] = frozenset()

        def __init__(self, *tokens: str) -> None:
            self._tokens = tokens

        def token_to_id(self, token: str) -> int | None:
            return self._tokens.index(token) if token in self._tokens else None

    def form(name: str, *tokens: str) -> str:
        found = ToolFormat.named(name, With(*tokens))  # type: ignore[arg-type]
        assert found is not None
        return found.written.around[0] + found.written.call[0]

    assert form("mistral", "[TOOL_CALLS]", "[ARGS]") == "[TOOL_CALLS]NAME[ARGS]"
    assert form("mistral", "[TOOL_CALLS]").startswith("[TOOL_CALLS] [{")
    assert form("granite", "<|tool_call|>").startswith("<|tool_call|>[")
    assert form("granite", "<tool_call>").startswith("<tool_call>[")
    assert form("pythonic") == "[NAME("
    assert form("qwen3_coder").startswith("<tool_call>\n<function=")
    assert all(written.trigger or written.bare for name, written in FORMS if name != PLAIN_JSON)
    assert {name for name, _ in FORMS} == {*NAMES, PLAIN_JSON}
