from __future__ import annotations

import re
import time
from typing import Any

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text import grammar_runner
from pyserve.text.grammar import Tags, compile_grammar
from pyserve.text.grammar_constraint import GrammarConstraint
from tests.machine import slowness
from tests.text.grammars import allowed, text_of, vocabulary

COUNT = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
         "required": ["n"], "additionalProperties": False}  # fmt: skip
WEATHER: dict[str, Any] = {"begin": "<fn=weather>", "end": "</fn>",
                           "content": {"type": "json_schema", "json_schema": COUNT}}  # fmt: skip
TIME: dict[str, Any] = {"begin": "<fn=time>", "end": "</fn>",
                        "content": {"type": "regex", "pattern": "[0-9]{2}/[a-z]"}}  # fmt: skip
TRIGGERED: dict[str, Any] = {
    "type": "triggered_tags", "triggers": ["<fn="], "tags": [WEATHER, TIME]
}  # fmt: skip
CALL = r'<fn=(weather>\{"n":[0-9]\}|time>[0-9]{2}/[a-z])</fn>'


def spec(tags: dict[str, Any]) -> Tags:
    return Tags(param="response_format", tags=tags, whitespace="")


def play(tags: dict[str, Any], text: str) -> GrammarConstraint:
    vocab = vocabulary()
    constraint = compile_grammar(spec(tags), vocab).constraint()
    constraint.accept(vocab.tokenizer.encode_inner(text))
    return constraint


def can_end(constraint: GrammarConstraint) -> bool:
    return vocabulary().eos_token_ids[0] in allowed(constraint, vocabulary())


OLD: dict[str, Any] = {"type": "structural_tag", "triggers": ["<fn="], "structures": [
    {"begin": "<fn=weather>", "schema": COUNT, "end": "</fn>"}]}  # fmt: skip


@pytest.mark.parametrize("tags", [TRIGGERED, {"type": "structural_tag", "format": TRIGGERED}, OLD])
def test_text_is_free_until_a_trigger(tags: dict[str, Any]) -> None:
    assert can_end(play(tags, "Just text, <b>no</b> call < fn"))
    inside = play(tags, "Let me see. <fn=")
    assert inside.error is None
    assert not can_end(inside)
    for text in (
        'Hm. <fn=weather>{"n":3}</fn>',
        '<fn=weather>{"n":3}</fn> or <fn=weather>{"n":4}</fn>.',
    ):
        constraint = play(tags, text)
        assert constraint.error is None
        assert can_end(constraint)
    assert play(tags, '<fn=weather>{"m"').error is not None
    assert play(tags, "<fn=other>").error is not None


def test_at_least_one_and_no_more() -> None:
    one = {**TRIGGERED, "at_least_one": True, "stop_after_first": True}
    assert not can_end(play(one, "Only text"))
    constraint = play(one, "So: <fn=time>12/h</fn>")
    assert constraint.is_finished
    assert constraint.error is None
    assert play({**TRIGGERED, "at_least_one": True}, "So: <fn=time>12/h</fn>!").error is None
    assert can_end(play({**TRIGGERED, "stop_after_first": True}, "Only text"))


def test_every_call_of_a_list_is_valid() -> None:
    tags = {"type": "tags_with_separator", "tags": [WEATHER, TIME], "separator": "; ",
            "at_least_one": True}  # fmt: skip
    texts = {text_of(spec(tags), seed) for seed in range(12)}
    assert len(texts) > 6
    for text in texts:
        assert text is not None
        assert re.fullmatch(f"{CALL}(; {CALL})*", text), text
    alone = {**tags, "stop_after_first": True}
    for seed in range(6):
        assert re.fullmatch(CALL, text_of(spec(alone), seed) or "")


def test_a_special_token_is_meant_where_it_is_spelled() -> None:
    vocab = vocabulary()
    name, token_id = next(
        (name, i) for name, i in vocab.special_tokens.items() if i not in vocab.eos_token_ids
    )
    tags = {"type": "triggered_tags", "triggers": [name],
            "tags": [{**WEATHER, "begin": name + "call:"}]}  # fmt: skip
    constraint = play(tags, "Text ")
    assert token_id in allowed(constraint, vocab)
    constraint.accept([token_id])
    constraint.accept(vocab.tokenizer.encode_inner('call:{"n":3}</fn>'))
    assert constraint.error is None
    assert can_end(constraint)
    spelled = play(tags, "Text ")
    spelled.accept(vocab.tokenizer.encode_inner(name[:3]))
    assert spelled.error is None
    assert can_end(spelled)


def test_formats_within_formats() -> None:
    tags = {"type": "sequence", "elements": [
        {"type": "const_string", "value": 'a "quoted"\n'},
        {"type": "or", "elements": [{"type": "const_string", "value": "yes"},
                                    {"type": "regex", "pattern": "n/o{2}"}]},
        {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"},
    ]}  # fmt: skip
    assert play(tags, 'a "quoted"\nyes<t>any <b> text</t>').is_finished
    assert play(tags, 'a "quoted"\nn/oo<t></t>').is_finished
    assert play(tags, 'a "quoted"\nno').error is not None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "/type: must be one of"),
    ({"type": "qwen_xml"}, "/type: must be one of"),
    ({"format": {"type": ["or"]}}, "at /format/type: must be one of"),
    ({"type": "const_string"}, "at /value: must be a text"),
    ({"type": "sequence", "elements": []}, "at /elements: must be a list"),
    ({"type": "or", "elements": [1]}, "at /elements/0: must be an object"),
    ({"type": "tag", "begin": "<", "end": ">"}, "at /content: must be an object"),
    ({**TRIGGERED, "triggers": []}, "at /triggers: must be a list"),
    ({**TRIGGERED, "triggers": ["<x"]}, "at /tags/0/begin: must begin with one of the triggers"),
    ({**TRIGGERED, "tags": [{**WEATHER, "content": {"type": "json_schema", "json_schema":
      {"not": 1}}}]}, "/tags/0/content/json_schema at /not: not cannot be enforced"),
    ({"type": "regex", "pattern": "(?=a)"}, "at /pattern: "),
    ({"type": "any_text", "excludes": ["x"]}, "there may be no field here beside type, got excl"),
    ({"format": TRIGGERED, "triggers": ["<"]}, "there may be format here beside type, got trigg"),
    ({**OLD, "structures": [{**OLD["structures"][0], "x": 1}]}, "at /structures/0: there may be"),
    ({**TRIGGERED, "tags": [{**WEATHER, "style": "x"}]}, "at /tags/0: there may be begin, content"),
    ({**TRIGGERED, "tags": [{**WEATHER, "type": "or"}]}, "at /tags/0/type: must be tag, got 'or'"),
    ({**TRIGGERED, "at_least_one": "no"}, "at /at_least_one: must be true or false, got 'no'"),
    ({"type": "const_string", "value": "x" * 2000}, "at /value: must be a text of at most"),
]  # fmt: skip


@pytest.mark.parametrize(("tags", "reason"), REFUSED)
def test_refused(tags: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as caught:
        compile_grammar(spec(tags), vocabulary())
    assert str(caught.value).startswith("response_format")
    assert caught.value.param == "response_format"


def test_too_many_and_too_deep() -> None:
    tags: dict[str, Any] = {"type": "const_string", "value": "x"}
    for _ in range(20):
        tags = {"type": "sequence", "elements": [tags]}
    with pytest.raises(InvalidRequestError, match="within another"):
        compile_grammar(spec(tags), vocabulary())
    many = {"type": "sequence", "elements": [{"type": "any_text"}] * 501}
    with pytest.raises(InvalidRequestError, match="must be a list of 1 to"):
        compile_grammar(spec(many), vocabulary())


LARGE = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(390)}}
SHARED = {"X": {"type": "object", "properties": {f"p{i}": LARGE for i in range(12)}}}
HOSTILE: list[tuple[Any, str]] = [
    ({f"a{i}": {"type": "string"} for i in range(201)}, "more than 200 properties"),
    ({f"a{i}": {"$ref": "#/$defs/X"} for i in range(200)}, "take more than 2097152 characters"),
]


@pytest.mark.parametrize("form", ["python", "tags"])
@pytest.mark.parametrize(("properties", "reason"), HOSTILE, ids=["many", "shared"])
def test_hostile_arguments(
    form: str, properties: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow core must not meet the limit of time before that of characters.
    limit_s = grammar_runner.MAX_COMPILE_S * slowness()
    monkeypatch.setattr(grammar_runner, "MAX_COMPILE_S", limit_s)
    schema = {"type": "object", "properties": properties, "$defs": SHARED}
    began_s = time.process_time()  # the machine may be busy
    with pytest.raises(InvalidRequestError, match=reason):
        compile_grammar(
            spec({"type": "arguments", "form": form, "json_schema": schema}), vocabulary()
        )
    assert time.process_time() - began_s < 5


def test_arguments_need_a_form_and_a_schema() -> None:
    several: list[dict[str, Any]] = [
        {"form": "xml", "json_schema": {}}, {"form": "tags"}, {"json_schema": {}},
    ]  # fmt: skip
    for fields in several:
        with pytest.raises(InvalidRequestError, match="must have the form python or tags"):
            compile_grammar(spec({"type": "arguments", **fields}), vocabulary())


@pytest.mark.parametrize(("form", "begin"), [("python", ""), ("tags", "<parameter=")])
def test_names_of_any_arguments_are_bounded(form: str, begin: str) -> None:
    """Longer ones are none to the parsers."""
    tags = {"type": "arguments", "form": form, "json_schema": {"type": "object"}}
    vocab = vocabulary()
    compiled = compile_grammar(spec(tags), vocab)
    for length, is_allowed in ((64, True), (65, False)):
        constraint = compiled.constraint()
        constraint.accept(vocab.tokenizer.encode_inner(begin + "x" * length))
        assert (constraint.error is None) is is_allowed
