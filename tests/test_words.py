"""Wording that messages share."""

from __future__ import annotations

import pytest

from pyserve.words import counted


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 requests"), (1, "1 request"), (2, "2 requests")]
)
def test_one_is_not_many(number: int, words: str) -> None:
    assert counted(number, "request") == words
