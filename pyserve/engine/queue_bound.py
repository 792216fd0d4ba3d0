"""QueueBound: how many sequences may wait, and when a place may be free for those refused."""

from __future__ import annotations

import math
import time
from collections import deque

from pyserve.errors import InvalidRequestError, QueueFullError
from pyserve.log import get_logger
from pyserve.words import counted

RATE_SAMPLE_S = 1.0
RATE_WINDOW_S = 20.0
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 60
LOG_INTERVAL_S = 10.0


class QueueBound:
    """Keeps the sequences of an engine, running and waiting, at num_slots + max_queue.

    The slots count, as what has just come waits for the next step even where slots are free.
    """

    def __init__(self, *, max_queue: int, num_slots: int) -> None:
        self._max_queue = max_queue
        self._max_seqs = max_queue + num_slots
        self._samples: deque[tuple[float, int]] = deque()  # time, sequences that had ended
        self._num_unlogged = 0
        self._may_log_at_s = 0.0

    def note(self, now_s: float, num_finished: int) -> None:
        """Called after each step, so that the rate is known when it is asked for."""
        samples = self._samples
        if samples and now_s - samples[-1][0] < RATE_SAMPLE_S:
            return
        samples.append((now_s, num_finished))
        while now_s - samples[0][0] > RATE_WINDOW_S:
            samples.popleft()

    def check(self, num_new: int, *, num_seqs: int, num_waiting: int, num_finished: int) -> None:
        """Raises QueueFullError where `num_new` sequences beside `num_seqs` are too many.

        All or none. What could not even enter an idle engine is an InvalidRequestError.
        """
        if num_seqs + num_new <= self._max_seqs:
            return
        if num_new > self._max_seqs:
            raise InvalidRequestError(
                f"the request makes {num_new} sequences, this server takes {self._max_seqs} at "
                "once (--max-num-seqs and --max-queue)",
                "n",
            )
        now_s = time.monotonic()
        self._log(now_s)
        retry_after_s = self.retry_after_s(now_s, num_waiting, num_finished)
        raise QueueFullError(
            f"the queue is full: {counted(num_waiting, 'sequence')} waiting, the limit is "
            f"{self._max_queue}; try again in {retry_after_s} s",
            retry_after_s,
        )

    def retry_after_s(self, now_s: float, num_waiting: int, num_finished: int) -> int:
        """Whole seconds in which what waits now will have begun, at the recent rate."""
        recent = [sample for sample in self._samples if now_s - sample[0] <= RATE_WINDOW_S]
        if not recent or now_s - recent[0][0] < RATE_SAMPLE_S:
            return MIN_RETRY_AFTER_S  # nothing is known yet
        began_s, began = recent[0]
        if num_finished == began:
            return MAX_RETRY_AFTER_S
        wait_s = num_waiting * (now_s - began_s) / (num_finished - began)
        return min(max(math.ceil(wait_s), MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    def _log(self, now_s: float) -> None:
        self._num_unlogged += 1
        if now_s < self._may_log_at_s:
            return
        get_logger().warning(
            "the queue is full (its limit is %d): %s refused with 429",
            self._max_queue,
            counted(self._num_unlogged, "request"),
        )
        self._num_unlogged = 0
        self._may_log_at_s = now_s + LOG_INTERVAL_S
