"""The benchmark of masks: it measures what it names."""

from __future__ import annotations

import re

import pytest

from bench import mask_cost


def test_both_tables_are_filled(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--runs", "2", "--rows", "6", "--vocab-size", "3000", "--threads", "1", "2"]
    assert mask_cost.main(argv) == 0
    printed = capsys.readouterr().out
    for name in ("mask", "accept", "the floor", "1 threads", "2 threads"):
        found = re.search(rf"^{name} +(\d+(\.\d+)?)", printed, re.MULTILINE)
        assert found is not None and float(found[1]) >= 0.0, printed
    assert "masks of 6 rows" in printed
