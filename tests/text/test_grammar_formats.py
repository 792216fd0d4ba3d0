"""Formats of strings: what is enforced, and which names are notes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import JsonSchema, compile_grammar
from pyserve.text.grammar_formats import ANY_STRING, STANDARD
from tests.text.grammars import allowed, vocabulary

UUID = "f81d4fae-7dec-41d0-a765-00a0c91e6bf6"
ENFORCED: list[tuple[str, list[str], list[str]]] = [
    ("uuid4", [UUID, UUID.upper()], [UUID.replace("-41", "-11"), UUID.replace("-a7", "-c7"), ""]),
    ("uuid1", [UUID.replace("-41", "-11")], [UUID, UUID[:-1]]),
    ("base64", ["", "QQ==", "QUI=", "QUJD", "QUJDQQ=="], ["Q", "QQ", "QQ=", "QUJD=", "Q_=="]),
    ("byte", ["QUI="], ["QU I="]),
    ("json-pointer", ["", "/", "/a~1b/~0", "//é"], ["a", "/~", "/~2", "#/a"]),
    ("relative-json-pointer", ["0", "12/a~0", "0#", "1-1/x", "2+3#"], ["", "01", "-1", "1-0"]),
]  # fmt: skip


def passes(schema: Mapping[str, object], text: str) -> bool:
    vocab = vocabulary()
    constraint = compile_grammar(JsonSchema(param="s", schema=schema), vocab).constraint()
    constraint.accept(vocab.tokenizer.encode_inner(json.dumps(text, ensure_ascii=False)))
    if constraint.error is not None:
        return False
    return constraint.is_finished or vocab.eos_token_ids[0] in allowed(constraint, vocab)


@pytest.mark.parametrize(("name", "valid", "wrong"), ENFORCED, ids=lambda value: str(value)[:20])
def test_enforced(name: str, valid: list[str], wrong: list[str]) -> None:
    schema = {"type": "string", "format": name}
    assert [text for text in [*valid, *wrong] if passes(schema, text)] == valid


def test_notes() -> None:
    for name in ANY_STRING:
        assert passes({"type": "string", "format": name}, "/any string")
    # As Zod writes them: the pattern says it.
    for schema in ({"pattern": "^[0-9a-z]+$"}, {"allOf": [{"pattern": "^[0-9a-z]+$"}]}):
        own = {"type": "string", "format": "cuid2", **schema}
        assert passes(own, "a0") and not passes(own, "A")


@pytest.mark.parametrize("name", [*sorted(STANDARD), "cuid2", "PASSWORD", 7, None, ["date"]])
def test_refused(name: object) -> None:
    beside = {"pattern": "^a"} if name not in ("cuid2", "PASSWORD") else {}
    with pytest.raises(InvalidRequestError, match="s at /format: must be one of base64, byte, "):
        passes({"type": "string", "format": name, **beside}, "a")
