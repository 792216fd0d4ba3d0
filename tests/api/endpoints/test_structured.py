"""Fields of structured outputs -> one spec; what they refuse, and what reaches the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pyserve.api.endpoints.structured import read_spec
from pyserve.api.wire.protocol import ChatRequest, CompletionRequest
from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import Choice, Grammar, JsonSchema, Regex, Spec, Tags
from tests.api.fakes import MODEL, Server, run_server

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
OBJECT = {"type": "object"}
TAGS: dict[str, Any] = {"type": "const_string", "value": "x"}
CHAT = "/v1/chat/completions"
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}),
    ("/v1/completions", {"model": MODEL, "prompt": "hi"}),
]


def response_format(kind: str, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind, **more}}


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return response_format("json_schema", json_schema={"name": "n", "schema": schema, **more})


def structured(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


SPECS: list[tuple[dict[str, Any], Spec | None]] = [
    ({}, None),
    (response_format("text"), None),
    (response_format("json_object"), JsonSchema(param="response_format", schema=OBJECT)),
    (response_format("json_object", schema=SCHEMA),
     JsonSchema(param="response_format.schema", schema=SCHEMA)),
    (json_schema(SCHEMA), JsonSchema(param="response_format.json_schema.schema", schema=SCHEMA)),
    (json_schema(SCHEMA, strict=True, description="d"),
     JsonSchema(param="response_format.json_schema.schema", schema=SCHEMA)),
    (json_schema(SCHEMA, strict=False),
     JsonSchema(param="response_format.json_schema.schema", schema=SCHEMA)),
    (response_format("structural_tag", format=TAGS),
     Tags(param="response_format.format", tags=TAGS)),
    (response_format("structural_tag", structures=[{"begin": "<"}], triggers=["<"]),
     Tags(param="response_format", tags={"structures": [{"begin": "<"}], "triggers": ["<"]})),
    (structured(json=SCHEMA), JsonSchema(param="structured_outputs.json", schema=SCHEMA)),
    (structured(json=json.dumps(SCHEMA)),
     JsonSchema(param="structured_outputs.json", schema=SCHEMA)),
    (structured(json_object=True),
     JsonSchema(param="structured_outputs.json_object", schema=OBJECT)),
    (structured(json=SCHEMA, disable_any_whitespace=True, disable_additional_properties=True),
     JsonSchema(param="structured_outputs.json", schema=SCHEMA, whitespace="",
                has_additional_properties=False)),
    (structured(json=SCHEMA, whitespace_pattern=r"[ \n]*"),
     JsonSchema(param="structured_outputs.json", schema=SCHEMA, whitespace=r"[ \n]{0,32}")),
    (structured(regex="a+"), Regex(param="structured_outputs.regex", pattern="a+")),
    (structured(choice=["a", "b"]), Choice(param="structured_outputs.choice", texts=["a", "b"])),
    (structured(grammar="start: x"), Grammar(param="structured_outputs.grammar", text="start: x")),
    (structured(structural_tag=json.dumps(TAGS)),
     Tags(param="structured_outputs.structural_tag", tags=TAGS)),
    ({"guided_json": SCHEMA}, JsonSchema(param="guided_json", schema=SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " ?"},
     JsonSchema(param="guided_json", schema=SCHEMA, whitespace=" ?")),
    ({"guided_regex": "a+"}, Regex(param="guided_regex", pattern="a+")),
    ({"guided_choice": ["a"]}, Choice(param="guided_choice", texts=["a"])),
    ({"guided_grammar": "root ::= x"}, Grammar(param="guided_grammar", text="root ::= x")),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), SPECS)
def test_every_field_is_one_spec(fields: dict[str, Any], expected: Spec | None) -> None:
    for wire_type, body in ((ChatRequest, {"messages": []}), (CompletionRequest, {"prompt": "x"})):
        ignored: list[str] = []
        request = msgspec.convert({**body, **fields}, wire_type)
        assert read_spec(request, ignored) == expected
        assert ignored == []


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({**json_schema(SCHEMA), "guided_regex": "a"}, "guided_regex", "both ask for a structured"),
    ({"guided_json": {}, "guided_choice": ["a"]}, "guided_choice", "both ask for a structured"),
    (structured(json={}, regex="a"), "structured_outputs.regex", "both ask for a structured"),
    ({**response_format("json_object"), **structured(regex="a")}, "structured_outputs.regex",
     "response_format and structured_outputs.regex both"),
    (structured(), "structured_outputs", "must have one of json"),
    (structured(json_object=False), "structured_outputs", "must have one of json"),
    (structured(whitespace_pattern=" "), "structured_outputs", "must have one of json"),
    (response_format("yaml"), "response_format.type", "must be one of text, json_object"),
    (response_format("json_schema"), "response_format.json_schema", "is missing"),
    (response_format("json_schema", json_schema={"name": "x"}),
     "response_format.json_schema.schema", "is missing"),
    (response_format("json_schema", json_schema={"schema": {}}),
     "response_format.json_schema.name", "is missing"),
    (json_schema("string"), "response_format.json_schema.schema", "expected"),
    (json_schema({"type": "array", "uniqueItems": True}), "response_format.json_schema.schema",
     "response_format.json_schema.schema at /uniqueItems: uniqueItems cannot be enforced"),
    (response_format("structural_tag"), "response_format.format", "is missing"),
    (response_format("text", json_schema={"name": "x", "schema": SCHEMA}),
     "response_format.json_schema", "goes with the type json_schema, got text"),
    (response_format("json_object", triggers=["<"]), "response_format.triggers", "goes with"),
    (response_format("json_schema", schema=SCHEMA), "response_format.schema",
     "goes with the type json_object, got json_schema"),
    (response_format("json_object", schema={"not": 1}), "response_format.schema",
     "response_format.schema at /not: not cannot be enforced"),
    ({"response_format": {**json_schema(SCHEMA)["response_format"], "format": {}}},
     "response_format.format", "goes with the type structural_tag"),
    (response_format("structural_tag", format={"type": "any_text"}, structures=[]),
     "response_format.format", "both say what the answer is"),
    (json_schema({"format": "date", "type": 5}), "response_format.json_schema.schema",
     "at /type: must be one or several of"),
    (response_format("structural_tag", format={"type": "x"}), "response_format.format",
     "response_format.format at /type: must be one of"),
    ({"response_format": {}}, "response_format.type", "is missing"),
    ({"guided_json": ""}, "guided_json", "is not valid JSON"),
    ({"guided_json": "{"}, "guided_json", "is not valid JSON"),
    ({"guided_json": "[" * 100_000}, "guided_json", "is not valid JSON"),
    ({"guided_json": " " * 2**19}, "guided_json", "characters, the limit is"),
    ({"guided_json": {"description": "x" * 2**19}}, "guided_json", "bytes or more, the limit is"),
    ({"guided_choice": ["x" * 30_000] * 9}, "guided_choice", "bytes or more, the limit is"),
    ({"guided_json": "NaN"}, "guided_json", "is not valid JSON"),
    ({"guided_json": "null"}, "guided_json", "must be an object or a boolean"),
    ({"guided_json": '"x"'}, "guided_json", "must be an object or a boolean"),
    ({"guided_regex": ""}, "guided_regex", "must not be empty"),
    ({"guided_regex": "("}, "guided_regex", "is not closed"),
    ({"guided_choice": []}, "guided_choice", "must list 1 to"),
    ({"guided_choice": [1]}, "guided_choice[0]", "expected `str`"),
    ({"guided_choice": [None]}, "guided_choice[0]", "expected `str`"),
    ({"guided_grammar": ""}, "guided_grammar", "must be a grammar in Lark"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar", "cannot be enforced"),
    ({"guided_json": {}, "guided_whitespace_pattern": "x"}, "guided_whitespace_pattern",
     "must be a pattern of spaces"),
    (structured(structural_tag="[]"), "structured_outputs.structural_tag", "must be an object"),
    (structured(json={}, whitespace_pattern="("), "structured_outputs.whitespace_pattern", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"regex": "a", "whitespace_pattern": " "}, ["whitespace_pattern"]),
        ({"choice": ["a"], "disable_any_whitespace": True}, ["disable_any_whitespace"]),
        ({"json_object": True, "disable_additional_properties": True},
         ["disable_additional_properties"]),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True},
         ["whitespace_pattern"]),
    ],
)  # fmt: skip
def test_settings_of_another_kind_are_named(fields: dict[str, Any], names: list[str]) -> None:
    ignored: list[str] = []
    request = msgspec.convert({"messages": [], **structured(**fields)}, ChatRequest)
    assert read_spec(request, ignored) is not None
    assert ignored == [f"structured_outputs.{name}" for name in names]


@pytest.mark.parametrize(("fields", "param", "reason"), REFUSED)
def test_refused_by_name(server: Server, fields: dict[str, Any], param: str, reason: str) -> None:
    for path, body in BODIES:
        error = server.error(path, {**body, **fields})
        assert error["param"] == param
        assert reason.replace("`", "") in error["message"]
    assert server.engine.submitted == []


def test_each_choice_has_a_constraint_of_its_own(server: Server) -> None:
    for path, body in BODIES:
        server.play("Hello")
        server.post(path, {**body, "n": 3, "temperature": 1, **json_schema(SCHEMA)})
        constraints = [item.constraint for item in server.engine.submitted]
        assert len({id(constraint) for constraint in constraints}) == 3
        assert None not in constraints


def test_nothing_asked_is_no_constraint(server: Server) -> None:
    for path, body in BODIES:
        for fields in ({}, response_format("text")):
            server.play("Hello")
            server.post(path, {**body, **fields})
            assert [item.constraint for item in server.engine.submitted] == [None]


def test_what_has_no_effect_is_named(server: Server) -> None:
    path, body = BODIES[0]
    fields = {"guided_whitespace_pattern": " ", "guided_decoding_backend": "outlines",
              "response_format": {"type": "text", "lax": True}}  # fmt: skip
    status, headers, _ = server.request("POST", path, {**body, **fields})
    assert status == 200
    assert headers["x-pyserve-ignored"] == (
        "guided_decoding_backend, guided_whitespace_pattern, response_format.lax"
    )


def test_two_that_ask_for_the_same_are_two() -> None:
    request = CompletionRequest(prompt="x", guided_regex="a", guided_grammar="b")
    with pytest.raises(InvalidRequestError, match="guided_regex and guided_grammar both"):
        read_spec(request, [])


@pytest.mark.parametrize(("prompt_ends_with", "is_free"), [("<think>\n", True), ("", False)])
def test_behind_a_reasoning_parser_the_thinking_is_free(
    tokenizer_folder: Path, prompt_ends_with: str, is_free: bool
) -> None:
    """A prompt that opens the thinking; and one that leaves it to the answer, both ways open."""
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "well" + prompt_ends_with},
    ]
    begun = {"add_generation_prompt": False, "continue_final_message": True}
    with run_server(tokenizer_folder, reasoning_parser="deepseek_r1") as server:
        tokenizer = server.tokenizer
        messages = messages if is_free else messages[:1]
        fields = {**(begun if is_free else {}), "structured_outputs": {"choice": ["yes", "no"]}}
        server.play("Hello")
        server.post(CHAT, {"model": MODEL, "messages": messages, **fields})
        (item,) = server.engine.submitted
        constraint = item.constraint
        assert constraint is not None
        constraint.rollback(1000)  # the engine of the tests has played an answer
        assert constraint.is_free is is_free
        thinking = "a thought</think>" if is_free else "<think>a thought</think>"
        constraint.accept(tokenizer.encode(thinking, add_special_tokens=False))
        assert (constraint.is_free, constraint.is_finished, constraint.error) == (
            False,
            False,
            None,
        )
        constraint.accept(tokenizer.encode("yes", add_special_tokens=False))
        assert constraint.is_finished


def test_without_thinking_the_answer_may_begin_at_once(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, reasoning_parser="deepseek_r1") as server:
        server.play("Hello")
        server.post(CHAT, {**BODIES[0][1], **structured(choice=["yes", "no"])})
        (item,) = server.engine.submitted
        assert item.constraint is not None
        item.constraint.rollback(1000)
        item.constraint.accept(server.tokenizer.encode("no", add_special_tokens=False))
        assert item.constraint.is_finished
