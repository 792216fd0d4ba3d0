"""Startup: phases of the start-up, which the loading thread reports and the event loop shows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pyserve.log import get_logger

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Phase:
    """The present phase of the start-up. It is immutable, so that any thread may read it.

    name       such as "download" or "load".
    done       bytes or units of work that are done.
    total      the same in all; 0 where that is unknown.
    began_s    when the phase began, in monotonic seconds.
    counted_s  when `done` was last reported as 0, from where the speed is measured; None: began_s.
    """

    name: str
    done: int
    total: int
    began_s: float
    counted_s: float | None = None

    @property
    def progress(self) -> float | None:
        """The part that is done, from 0 to 1; None where the total is unknown."""
        return min(self.done / self.total, 1.0) if self.total > 0 else None

    def speed(self, now_s: float) -> float | None:
        """Bytes or units of work per second so far; None where that is unknown."""
        since_s = self.began_s if self.counted_s is None else self.counted_s
        if self.total <= 0 or self.done <= 0 or now_s <= since_s:
            return None
        return self.done / (now_s - since_s)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds to the end of this phase at the speed so far; None where that is unknown."""
        speed = self.speed(now_s)
        return None if speed is None else round(max(self.total - self.done, 0) / speed, 1)


class StopLoading(BaseException):
    """Raised by Startup.report in the loading thread, because the server has been told to stop."""


class Startup:
    """The present phase of the start-up, and the time that earlier ones took.

    The first phase begins when the process does, so their sum is how long the user has waited.
    """

    def __init__(self) -> None:
        began_s = time.monotonic() - _process_age_s()
        self._began_s = began_s
        self._seconds: dict[str, float] = {}  # duration of each ended phase, in their order
        self.phase = Phase("start", 0, 0, began_s)
        self._is_given_up = False

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def explain(self) -> str:
        """The duration of each ended phase, as in "start 0.9 + build 0.1 + load 1.0 = 2.0 s"."""
        parts = [f"{name} {seconds:.1f}" for name, seconds in self._seconds.items()]
        return f"{' + '.join(parts)} = {sum(self._seconds.values()):.1f} s"

    def describe(self) -> dict[str, object]:
        """The start-up as a JSON object: phase, progress (0 to 1), eta_s (s) and ended.

        progress and eta_s concern the present phase, and are None where they are unknown. ended has
        the duration in s of each phase that has ended, in their order.
        """
        phase = self.phase
        return {
            "phase": phase.name,
            "progress": phase.progress,
            "eta_s": phase.eta_s(time.monotonic()),
            "ended": {name: round(seconds, 1) for name, seconds in list(self._seconds.items())},
        }

    def report(self, name: str, done: int, total: int) -> None:
        """Report the progress of phase `name`; a new name ends the phase before it.

        `done` and `total` are bytes or units of work; total 0: unknown. The speed is measured from
        the last report with `done` 0. Only one thread may report at a time. Raises StopLoading
        once `give_up` has been called.
        """
        if self._is_given_up:
            raise StopLoading
        phase, now = self.phase, time.monotonic()
        if name != phase.name:
            self._end(phase, now)
            phase = Phase(name, done, total, now)
        counted_s = phase.counted_s if done else now
        self.phase = replace(phase, done=done, total=total, counted_s=counted_s)

    def give_up(self) -> None:
        """Let the next report raise StopLoading, so that the loading thread ends."""
        self._is_given_up = True

    def finish(self) -> None:
        """End the last phase."""
        self._end(self.phase, time.monotonic())

    def _end(self, phase: Phase, now_s: float) -> None:
        took_s = now_s - phase.began_s
        self._seconds[phase.name] = self._seconds.get(phase.name, 0.0) + took_s
        get_logger().info("%s: %.1f s", phase.name, took_s)


def _process_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started_s, 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
