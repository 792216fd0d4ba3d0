"""LoopWatchdog: measures by how much the event loop is late, with a timer that is always set.

Whatever blocks the loop or holds the GIL delays the timer, and every stream by the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pyserve.log import get_logger
from pyserve.words import counted

BEAT_S = 0.05  # delay of the timer
LATE_S = 0.1  # a beat that is later than this is logged
LOG_INTERVAL_S = 10.0  # minimum time between two such log lines
RECENT_S = 30.0  # `recent_lag_s` covers at most this time


class LoopWatchdog:
    """Measures the lag of the running event loop from `start` to `stop`; call both on that loop.

    num_requests  returns the number of requests in flight. With none in flight a late loop harms
                  nobody, so it is not logged.
    max_lag_s     the worst lag since the start, or since `forget`.
    num_late      beats that were late by more than LATE_S, likewise.
    """

    def __init__(self, num_requests: Callable[[], int]) -> None:
        self._num_requests = num_requests
        self._num_before = 0  # requests in flight when the timer was set
        self.max_lag_s = 0.0
        self.num_late = 0
        self._recent = (0.0, 0.0)  # worst lag of the present and the previous half of RECENT_S
        self._half_ends_s = 0.0
        self._due_s = 0.0
        self._worst_unlogged_s = 0.0
        self._num_unlogged = 0
        self._may_log_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def recent_lag_s(self) -> float:
        """The worst lag of the last 15 to 30 seconds."""
        return max(self._recent)

    def start(self) -> None:
        """Begin to watch the running loop."""
        now = time.monotonic()
        self._half_ends_s = now + RECENT_S / 2
        self._arm(now)

    def forget(self) -> None:
        """Forget what was measured so far, such as during the start-up."""
        self.max_lag_s = 0.0
        self.num_late = 0
        self._recent = (0.0, 0.0)

    def stop(self) -> None:
        """Stop measuring. Does nothing where it has not started."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, now: float) -> None:
        self._num_before = self._num_requests()
        self._due_s = now + BEAT_S
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        now = time.monotonic()
        self.note(now - self._due_s, now)
        self._arm(now)

    def note(self, lag_s: float, now_s: float) -> None:
        """Record a beat that came `lag_s` after it was due, and log a warning where that is due."""
        if now_s >= self._half_ends_s:
            self._recent = (0.0, self._recent[0])
            self._half_ends_s = now_s + RECENT_S / 2
        self._recent = (max(self._recent[0], lag_s), self._recent[1])
        self.max_lag_s = max(self.max_lag_s, lag_s)
        if lag_s > LATE_S:
            self.num_late += 1
            if self._num_before or self._num_requests():
                self._num_unlogged += 1
                self._worst_unlogged_s = max(self._worst_unlogged_s, lag_s)
        if self._num_unlogged and now_s >= self._may_log_at_s:
            get_logger().warning(
                "the event loop was late by up to %.0f ms (%s): streams have stood still",
                1000 * self._worst_unlogged_s,
                counted(self._num_unlogged, "time"),
            )
            self._may_log_at_s = now_s + LOG_INTERVAL_S
            self._num_unlogged = 0
            self._worst_unlogged_s = 0.0
