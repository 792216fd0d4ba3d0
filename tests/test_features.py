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
from pyserve.features import FEATURES, FLAGS, NO_EFFECT, PATHS, Feature, Field, fields_of

BODY = json.dumps({"messages": [{"role": "user", "content": "x"}], "logprobs": True}).encode()


def test_everything_belongs_to_one_feature() -> None:
    names = Counter(name for feature in FEATURES.values() for name in feature.flags)
    assert max(names.values()) == 1 and set(names) == set(FLAGS)
    assert len(PATHS) == len(set(PATHS)) and not set(PATHS) & {route.path for route in ROUTES}
    rows = [*NO_EFFECT, *(row for feature in FEATURES.values() for row in feature.fields)]
    homes = Counter((row.name, wire_type) for row in rows for wire_type in row.of)
    assert max(homes.values()) == 1
    assert all(feature != Feature() for feature in FEATURES.values())


def test_a_feature_is_switched_on_by_taking_its_rows_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotBuiltError, match="logprobs is not built yet"):
        Wire(ChatRequest).decode(BODY)
    assert "logprobs" not in schemas()["ChatRequest"]["properties"]
    monkeypatch.delitem(features.FEATURES, "logprobs")
    request, ignored = Wire(ChatRequest).decode(BODY)
    assert request.logprobs is True and ignored == []
    for name in ("ChatRequest", "CompletionRequest"):
        assert {"logprobs", "prompt_logprobs"} <= set(schemas()[name]["properties"])


def test_a_field_may_be_built_for_one_endpoint_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(
        Field("logprobs", ("CompletionRequest",), (False,)) if row.name == "logprobs" else row
        for row in FEATURES["logprobs"].fields
    )
    monkeypatch.setitem(features.FEATURES, "logprobs", Feature(fields=rows))
    assert Wire(ChatRequest).decode(BODY)[0].logprobs is True
    with pytest.raises(NotBuiltError, match="logprobs is not built yet"):
        Wire(CompletionRequest).decode(b'{"prompt": "x", "logprobs": 1}')


@pytest.mark.parametrize(
    ("value", "is_neutral"), [(None, True), (False, True), (0, False), (True, False), ("", False)]
)
def test_neutral_values_count_by_their_type(value: object, is_neutral: bool) -> None:
    assert fields_of(ChatRequest)["logprobs"].is_neutral(value) is is_neutral
