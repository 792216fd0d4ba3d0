"""References of every spelling, and what has several meanings or none."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.text.grammar import JsonSchema
from pyserve.text.grammar_references import LostReferenceError, References
from tests.text.grammars import text_of

FIVE = {"const": 5}
ROOT: dict[str, Any] = {
    "$id": "https://example.org/s",
    "$anchor": "whole",
    "$defs": {
        "a/b~c d": {"$anchor": "five", "const": 5},
        "old": {"$id": "#older", "definitions": {"x": {"id": "#oldest"}}},
        "twice": {"$anchor": "two", "not": {"items": [{"$dynamicAnchor": "two"}]}},
        "other": {"$id": "other", "$anchor": "inner", "$defs": {"x": {"$anchor": "inmost"}}},
        "named": {"properties": {"$anchor": {"$dynamicAnchor": "property"}}},
        "plain": {"enum": [{"$anchor": "value"}], "default": {"$anchor": "value"}},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "pointer"),
    [
        ("#", ""), ("#/", ""), ("https://example.org/s", ""), ("#whole", ""),
        ("#/$defs/a~1b~0c%20d", "/$defs/a~1b~0c d"), ("#five", "/$defs/a~1b~0c d"),
        ("https://example.org/s#five", "/$defs/a~1b~0c d"),
        ("#older", "/$defs/old"), ("#oldest", "/$defs/old/definitions/x"),
        ("#property", "/$defs/named/properties/$anchor"),
        ("#/$defs/twice/not/items/0", "/$defs/twice/not/items/0"),
        ("#/$defs/other", "/$defs/other"),
    ],
)  # fmt: skip
def test_where_a_reference_leads(reference: str, pointer: str) -> None:
    references = References(ROOT)
    assert references.pointer(reference) == pointer
    assert references.at(pointer) is references.at(references.pointer("#" + pointer))


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("#nothing", 'no schema in this one has the anchor "#nothing"'),
        ("#value", "no schema in this one"), ("#inner", "no schema in this one"),
        ("#inmost", "no schema in this one"), ("#two", "several schemas have the anchor"),
        ("#/$defs/other/$defs/x", "nothing at"), ("#/$defs/nothing", "nothing at"),
        ("other", "must point into this schema"), ("https://example.org/t#five", "must point into"),
        ("five", "must point into this schema"), ("", "must point into this schema"),
    ],
)  # fmt: skip
def test_what_leads_nowhere(reference: str, words: str) -> None:
    with pytest.raises(LostReferenceError, match=words.replace("$", r"\$")):
        References(ROOT).pointer(reference)


@pytest.mark.parametrize(
    ("schema", "answers"),
    [
        ({"$defs": {"x": {"$anchor": "five", **FIVE}}, "$ref": "#five"}, {"5"}),
        ({"$defs": {"x": {"$dynamicAnchor": "five", **FIVE}}, "$dynamicRef": "#five"}, {"5"}),
        ({"$defs": {"x": FIVE}, "$dynamicRef": "#/$defs/x"}, {"5"}),
        (
            {
                "$defs": {"x": {"enum": [4, 5]}, "y": {"enum": [5, 6]}},
                "$ref": "#/$defs/x",
                "$dynamicRef": "#/$defs/y",
            },
            {"5"},
        ),
        (
            {
                "$defs": {"x": {"enum": [4, 5]}, "y": {"enum": [5, 6]}},
                "$ref": "#/$defs/x",
                "allOf": [{"enum": [5, 7]}],
                "$recursiveRef": "#/$defs/y",
            },
            {"5"},
        ),
    ],
)
def test_what_they_lead_to_holds(schema: Any, answers: set[str]) -> None:
    spec = JsonSchema(param="s", schema=schema, whitespace="")
    assert {text_of(spec, seed) for seed in range(4)} == answers


@pytest.mark.parametrize("keyword", ["$dynamicRef", "$recursiveRef"])
def test_what_holds_itself(keyword: str) -> None:
    """A tree by the words of either draft."""
    where = "#node" if keyword == "$dynamicRef" else "#"
    schema = {
        "$dynamicAnchor": "node", "$recursiveAnchor": True, "type": "object",
        "properties": {"next": {keyword: where}}, "additionalProperties": False,
    }  # fmt: skip
    spec = JsonSchema(param="s", schema=schema, whitespace="")
    texts = {text_of(spec, seed) for seed in range(12)} - {None}
    assert len(texts) > 1
    for text in texts:
        assert text is not None
        assert text.replace('{"next":', "{").replace("{", "").replace("}", "") == ""
