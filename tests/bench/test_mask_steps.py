"""The clock keeps time, and what runs on it is the engine."""

from __future__ import annotations

import pytest

from bench import mask_steps


def test_it_prints_a_row_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--rows", "8", "--vocab-size", "2000", "--steps", "12", "--runs", "1"]
    assert mask_steps.main([*argv, "--forward-ms", "2", "--sampling-ms", "1"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line[:1] != "!"]
    rows = {line[:23].strip(): line[23:].split() for line in table[2:]}
    assert list(rows) == ["no constraint", *(name for name, _, _ in mask_steps.SPECS)]
    for figures in rows.values():
        assert len(figures) == 5 and float(figures[0]) >= 2.9  # the card's own 3 ms
