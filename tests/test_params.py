"""Ranges of the sampling parameters: every limit has a value on each side."""

from __future__ import annotations

import math

import pytest

from pyserve.errors import InvalidRequestError
from pyserve.limits import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from pyserve.params import SamplingParams

ACCEPTED = [
    {"temperature": 0.0}, {"temperature": 2.0}, {"top_p": 1e-9}, {"top_p": 1.0}, {"min_p": 0.0},
    {"min_p": 1.0}, {"top_k": 0}, {"top_k": 1}, {"presence_penalty": -2.0},
    {"frequency_penalty": 2.0}, {"repetition_penalty": 0.01}, {"temperature": 0.01},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1}, {"min_tokens": 8}, {"logit_bias": {3: -100.0, 4: 100.0}},
    {"stop_token_ids": tuple(range(MAX_STOP_TOKEN_IDS))}, {"allowed_token_ids": (3,)},
    {"bad_words": ((1, 2), (3,)) * MAX_BAD_WORDS},
]  # fmt: skip
REFUSED = [
    {"temperature": -0.1}, {"temperature": 1e-300}, {"top_p": 1e-300},
    {"repetition_penalty": 1e-300}, {"temperature": 2.1}, {"temperature": math.nan},
    {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1},
    {"top_k": -1}, {"presence_penalty": 2.1}, {"frequency_penalty": -2.1},
    {"repetition_penalty": 0.0}, {"repetition_penalty": math.nan}, {"max_tokens": 0},
    {"min_tokens": -1}, {"min_tokens": 9}, {"seed": 2**63}, {"logit_bias": {3: 100.5}},
    {"logit_bias": {3: math.nan}}, {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0)},
    {"stop_token_ids": tuple(range(MAX_STOP_TOKEN_IDS + 1))}, {"allowed_token_ids": ()},
    {"bad_words": ((1,),) * (2 * MAX_BAD_WORDS + 1)}, {"bad_words": ((1,), ())},
]  # fmt: skip


@pytest.mark.parametrize("values", ACCEPTED, ids=str)
def test_limits_are_inclusive(values: dict[str, object]) -> None:
    params = SamplingParams(**{"max_tokens": 8, **values})  # type: ignore[arg-type]
    name, value = next(iter(values.items()))
    assert getattr(params, name) == value


@pytest.mark.parametrize("values", REFUSED, ids=lambda values: str(values)[:60])
def test_values_out_of_range_name_the_field(values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{"max_tokens": 8, **values})  # type: ignore[arg-type]
    name = next(iter(values))
    assert caught.value.param == name
    assert name in caught.value.message


def test_has_penalties() -> None:
    assert not SamplingParams(max_tokens=1, temperature=0.5).has_penalties
    for name, value in [
        ("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", -0.1),
    ]:  # fmt: skip
        assert SamplingParams(max_tokens=1, **{name: value}).has_penalties  # type: ignore[arg-type]
