"""Which cases were under way while a neighbour's stream stood still."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.hostile import Case
from bench.neighbour import Gap

COSTLY = frozenset({"large", "template", "structured", "grammar", "abort", "gone"})
LONG_S = 0.1  # that a case of another family takes before it is of interest
MAX_KEPT = 100_000
MAX_SHOWN = 12
SHOWN_GAPS = 3


class Suspects:
    """Cases that ask for much work or took long, and when.

    slowest_s  to the whole answer of `slowest`, among those that do not wait by themselves.
    """

    def __init__(self) -> None:
        self.slowest_s = 0.0
        self.slowest: Case | None = None
        self._ended: deque[tuple[float, float, Case]] = deque(maxlen=MAX_KEPT)

    @contextmanager
    def watch(self, case: Case) -> Iterator[None]:
        """While `case` is under way."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            ended_s = time.perf_counter()
            if ended_s - began_s > self.slowest_s and not case.is_slow:
                self.slowest_s, self.slowest = ended_s - began_s, _nameplate(case)
            if case.family in COSTLY or ended_s - began_s > LONG_S:
                self._ended.append((began_s, ended_s, _nameplate(case)))

    def around(self, gap: Gap) -> list[Case]:
        """Those under way during a part of it, the costly ones first, then who began last."""
        found = [
            (case.family not in COSTLY, -began_s, case)
            for began_s, ended_s, case in self._ended
            if began_s < gap.ended_s and ended_s > gap.began_s
        ]
        return [case for *_, case in sorted(found, key=lambda one: one[:2])]

    def describe(self, gaps: Sequence[Gap]) -> list[str]:
        """A line for the slowest answer, for each of the longest gaps and waits, and for each case
        beside these."""
        lines = []
        if self.slowest is not None:
            lines.append(f"slowest answer {self.slowest_s:.2f} s, of {self.slowest.title}")
        pauses = [gap for gap in gaps if gap.number][:SHOWN_GAPS]
        waits = [gap for gap in gaps if not gap.number][:SHOWN_GAPS]
        for gap in pauses + waits:
            cases = self.around(gap)
            lines.append(
                f"a gap of {1e3 * gap.length_s:.0f} ms before token {gap.number}, in which the "
                f"neighbour's own process was late by up to {1e3 * gap.late_s:.0f} ms; "
                f"{len(cases)} cases beside it"
            )
            lines += [f"  {one.title}" for one in cases[:MAX_SHOWN]]
        return lines


def _nameplate(case: Case) -> Case:
    """`case` without its bytes."""
    return Case(case.number, case.family, case.name, [])
