"""Which cases stood beside a gap."""

from __future__ import annotations

import time

from bench.hostile import Case
from bench.neighbour import Gap
from bench.suspects import LONG_S, Suspects


def case(number: int, family: str) -> Case:
    return Case(number, family, "x", [b"bytes"])


def test_the_costly_cases_of_a_gap_come_first() -> None:
    suspects = Suspects()
    with suspects.watch(case(1, "structured")):
        pass
    time.sleep(0.01)
    began_s = time.perf_counter()
    with suspects.watch(case(2, "field")), suspects.watch(case(3, "large")):
        time.sleep(LONG_S + 0.02)
    with suspects.watch(case(4, "header")):
        pass  # neither costly nor long
    gap = Gap(began_s, time.perf_counter(), 0.5, 7)
    assert [one.number for one in suspects.around(gap)] == [3, 2]
    slowest, first, *others = suspects.describe([gap])
    assert slowest.startswith("slowest answer 0.1") and slowest.endswith("of 2 (field: x)")
    assert "before token 7" in first and "late by up to 500 ms; 2 cases" in first
    assert others == ["  3 (large: x)", "  2 (field: x)"]


def test_who_waits_by_itself_is_no_slow_answer() -> None:
    suspects = Suspects()
    waiting = case(1, "silence")
    waiting.num_answers = 0
    with suspects.watch(waiting):
        time.sleep(0.01)
    assert suspects.slowest is None and suspects.describe([]) == []
