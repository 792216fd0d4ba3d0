"""bench.step_model: the engine on a clock."""

from __future__ import annotations

import pytest

from bench import step_model


def test_what_users_see_is_what_the_clock_says() -> None:
    """One user: a prompt in one step, then a step for each token, without a moment between."""
    figures = step_model.serve((100, 5, 1), num_requests=2, target_itl_ms=40)
    assert figures.num_ended == 2 and figures.shapes == {112: 2, 1: 8}
    assert figures.num_tokens == 2 * 104 and figures.num_padded == 2 * 116
    prompt_ms, token_ms = max(figures.ttft_ms), max(figures.gaps_ms)
    assert len(figures.ttft_ms) == 2 and len(figures.gaps_ms) == 8
    assert 5.1 < prompt_ms < 5.7 and 3.65 < token_ms < 3.7
    assert figures.end_ms == pytest.approx(sum(figures.ttft_ms) + sum(figures.gaps_ms))


def test_it_prints_a_row_for_each_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_model.main(["--loads", "600/8x3", "40/8x2", "--rounds", "2"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "padding" in header and [row.split()[0] for row in rows] == ["600/8x3", "40/8x2"]
    assert "640" in rows[0].split("%")[1]
