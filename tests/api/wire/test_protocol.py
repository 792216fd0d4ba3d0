"""The three tables of fields cover every field once."""

from __future__ import annotations

import msgspec
import pytest

from pyserve.api.wire.protocol import (
    BUILT,
    NO_EFFECT,
    NOT_BUILT,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    StreamOptions,
    TokenizeRequest,
)

REQUESTS = [ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest]


@pytest.mark.parametrize("request_type", REQUESTS)
def test_every_field_is_in_one_table(request_type: type[msgspec.Struct]) -> None:
    for name in request_type.__struct_fields__:
        assert (name in BUILT) + (name in NOT_BUILT) + (name in NO_EFFECT) == 1, name


def test_every_row_is_a_field() -> None:
    fields = {name for request_type in REQUESTS for name in request_type.__struct_fields__}
    fields.update(Message.__struct_fields__, StreamOptions.__struct_fields__)
    assert BUILT | NOT_BUILT.keys() | NO_EFFECT.keys() <= fields
