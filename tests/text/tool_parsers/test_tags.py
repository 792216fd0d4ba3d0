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
from pyserve.text.tool_parsers.json_formats import FORMATS, Written
from pyserve.text.tool_parsers.registry import JSON_FORMAT, PLAIN_JSON, ToolFormat, make_parser
from pyserve.text.tool_parsers.stage import Tools
from pyserve.text.tool_parsers.tags import may_call, must_call
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
FORMS = [(name, written) for name, row in FORMATS.items() for written in row.written]
TRIGGERED = [(name, written) for name, written in FORMS if written.trigger]


def tags(value: dict[str, Any]) -> Tags:
    return Tags(param="tools", tags=value)


def calls_in(name: str, text: str) -> tuple[str, list[Any]]:
    """The content, and the calls, whose arguments are checked by their schemas."""
    parser = make_parser(name, Tools(parameters=SCHEMAS))
    parts = [*parser.push(Content(text)), *parser.flush()]
    calls = tool_calls_of(parts)
    for call in calls:
        assert call.name is not None
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return content_of(parts), calls


@pytest.mark.parametrize("is_single", [False, True])
@pytest.mark.parametrize(("name", "written"), FORMS, ids=lambda v: v if isinstance(v, str) else "")
def test_calls_that_must_come(name: str, written: Written, is_single: bool) -> None:
    spec = tags(must_call(written, SCHEMAS, is_single=is_single))
    counts = set()
    for seed in range(12):
        text = text_of(spec, seed)
        if text is not None:
            content, calls = calls_in(name, text)
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
    compiled = compile_grammar(tags(may_call(written, SCHEMAS, is_single=False)), vocab)

    def play(text: str) -> Any:
        constraint = compiled.constraint(free_until=free_until)
        constraint.accept(vocab.tokenizer.encode_inner(text))
        return constraint

    ends = set(vocab.eos_token_ids)
    assert ends & set(allowed(play("Just {text}, [1]"), vocab))
    assert play("Just {text}, [1]").is_free is is_triggered
    begun = play("Well. " + written.trigger)
    assert begun.error is None and not begun.is_free and not ends & set(allowed(begun, vocab))
    begin, end = written.call
    arguments = '{"city": "Paris", "days": 2}'
    call = begin.replace("NAME", "get_weather") + arguments + end
    text = "Well. " + written.around[0] + call + written.around[1]
    whole = play(text)
    assert whole.error is None and ends & set(allowed(whole, vocab))
    assert [one.arguments for one in calls_in(name, text)[1]] == [arguments]
    again = play(f"{text} And {text}")
    assert again.error is None and ends & set(allowed(again, vocab))
    for wrong in ('{"city": "Paris", "days": 9}', '{"days": "2"}'):
        assert play(text.replace(arguments, wrong)).error is not None


def test_the_form_is_one_whose_marks_are_tokens() -> None:
    tokenizer = vocabulary().tokenizer

    class With:
        special_token_ids: frozenset[int] = frozenset()

        def __init__(self, *tokens: str) -> None:
            self._tokens = tokens

        def token_to_id(self, token: str) -> int | None:
            return self._tokens.index(token) if token in self._tokens else None

    def form(name: str, *tokens: str) -> str:
        found = ToolFormat.named(name, With(*tokens))  # type: ignore[arg-type]
        assert found is not None and found.written is not None
        return found.written.around[0] + found.written.call[0]

    assert form("mistral", "[TOOL_CALLS]", "[ARGS]") == "[TOOL_CALLS]NAME[ARGS]"
    assert form("mistral", "[TOOL_CALLS]").startswith("[TOOL_CALLS] [{")
    assert form("granite", "<|tool_call|>").startswith("<|tool_call|>[")
    assert form("granite", "<tool_call>").startswith("<tool_call>[")
    for name in ("pythonic", "qwen3_coder"):
        named = ToolFormat.named(name, tokenizer)
        assert named is not None and named.held() is JSON_FORMAT
    hermes = ToolFormat.named("hermes", tokenizer)
    assert hermes is not None and hermes.held() is hermes
    assert JSON_FORMAT.name == PLAIN_JSON
