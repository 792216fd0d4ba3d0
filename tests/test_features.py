"""What is not built stands in one table: a feature is switched on by moving its rows."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from pyserve import features
from pyserve.api.app import ROUTES
from pyserve.api.endpoints.body import Wire
from pyserve.api.pages.openapi import schemas
from pyserve.api.wire.protocol import ChatRequest, CompletionRequest
from pyserve.errors import NotBuiltError
from pyserve.features import FEATURES, FLAGS, NO_EFFECT, PATHS, Feature, Field

BODY = json.dumps(
    {"messages": [{"role": "user", "content": "x"}], "repetition_detection": {}}
).encode()


def test_everything_belongs_to_one_feature() -> None:
    names = Counter(name for feature in FEATURES.values() for name in feature.flags)
    assert max(names.values()) == 1 and set(names) == set(FLAGS)
    assert len(PATHS) == len(set(PATHS)) and not set(PATHS) & {route.path for route in ROUTES}
    rows = [*NO_EFFECT, *(row for feature in FEATURES.values() for row in feature.fields)]
    homes = Counter((row.name, wire_type) for row in rows for wire_type in row.of)
    assert max(homes.values()) == 1
    assert all(feature != Feature() for feature in FEATURES.values())


def test_a_feature_is_switched_on_by_taking_its_rows_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotBuiltError, match="repetition_detection is not built yet"):
        Wire(ChatRequest).decode(BODY)
    assert "repetition_detection" not in schemas()["ChatRequest"]["properties"]
    monkeypatch.delitem(features.FEATURES, "repetition detection")
    request, ignored = Wire(ChatRequest).decode(BODY)
    assert request.repetition_detection == {} and ignored == []
    for name in ("ChatRequest", "CompletionRequest"):
        assert "repetition_detection" in schemas()[name]["properties"]


def test_a_field_may_be_built_for_one_endpoint_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (Field("repetition_detection", ("CompletionRequest",)),)
    monkeypatch.setitem(features.FEATURES, "repetition detection", Feature(fields=rows))
    assert Wire(ChatRequest).decode(BODY)[0].repetition_detection == {}
    with pytest.raises(NotBuiltError, match="repetition_detection is not built yet"):
        Wire(CompletionRequest).decode(b'{"prompt": "x", "repetition_detection": {}}')


@pytest.mark.parametrize(
    ("value", "is_neutral"), [(None, True), (False, True), (0, False), (True, False), ("", False)]
)
def test_neutral_values_count_by_their_type(value: object, is_neutral: bool) -> None:
    assert Field("x", ("ChatRequest",), (False,)).is_neutral(value) is is_neutral
