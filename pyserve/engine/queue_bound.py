"""QueueBound: limits how many sequences may be queued, in total and by user, and estimates when a
refused request should try again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from pyserve.errors import InvalidRequestError, QueueFullError
from pyserve.log import get_logger
from pyserve.words import counted

RATE_SAMPLE_S = 1.0  # interval between samples of the number of finished sequences
RATE_WINDOW_S = 20.0  # the recent rate is that of this many seconds
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 60
LOG_INTERVAL_S = 10.0
MAX_PROMPT_TOKENS = 2**25  # of all sequences together; each token takes 40 bytes of host memory


class Load(NamedTuple):
    """A number of sequences that have not ended, and the total tokens of their prompts."""

    num_seqs: int = 0
    num_tokens: int = 0

    def __add__(self, other: Load) -> Load:  # type: ignore[override]
        return Load(self.num_seqs + other.num_seqs, self.num_tokens + other.num_tokens)

    def __sub__(self, other: Load) -> Load:
        return Load(self.num_seqs - other.num_seqs, self.num_tokens - other.num_tokens)

    def fits(self, limit: Load) -> bool:
        """Whether neither number exceeds that of `limit`."""
        return self.num_seqs <= limit.num_seqs and self.num_tokens <= limit.num_tokens


class QueueBound:
    """Limits the sequences of an engine, running and waiting, to num_slots + max_queue.

    Running sequences count as well, because a new sequence waits until the next step is scheduled
    even if slots are free.

    A single user may use the whole limit. When it is used up, another user is still accepted up to
    an equal share of it per user, so all users together may reach twice the limit. One request may
    have at most half of the limit, or num_slots sequences if that is more.
    """

    def __init__(self, *, max_queue: int, num_slots: int) -> None:
        self._max_queue = max_queue
        self._limit = Load(max_queue + num_slots, MAX_PROMPT_TOKENS)
        self._max_request_seqs = max(num_slots, self._limit.num_seqs // 2)
        self._samples: deque[tuple[float, int]] = deque()  # time, sequences that had ended
        self._num_unlogged = 0
        self._may_log_at_s = 0.0

    def note(self, now_s: float, num_finished: int) -> None:
        """Sample the number of finished sequences, to know their rate; called after each step."""
        samples = self._samples
        if samples and now_s - samples[-1][0] < RATE_SAMPLE_S:
            return
        samples.append((now_s, num_finished))
        while now_s - samples[0][0] > RATE_WINDOW_S:
            samples.popleft()

    def check(
        self, new: Load, *, load_of: Mapping[str, Load], load: Load, user: str, num_waiting: int,
        num_finished: int,
    ) -> None:  # fmt: skip
        """Raise QueueFullError if there is no room for all of a request's sequences.

        new           the load of the request; more sequences than one request may have at all are
                      an InvalidRequestError.
        load, load_of the present load in total, and of each user.
        num_waiting, num_finished
                      sequences that wait, and that have ended since the start.
        """
        if new.num_seqs > self._max_request_seqs:
            raise InvalidRequestError(
                f"the request makes {new.num_seqs} sequences, this server takes "
                f"{self._max_request_seqs} of one request (--max-num-seqs and --max-queue)",
                "n",
            )
        if (load + new).fits(self._limit):
            return
        own = load_of.get(user, Load()) + new
        num_users = len({*load_of, user})
        share = Load(self._limit.num_seqs // num_users, self._limit.num_tokens // num_users)
        if own.fits(share) and (load + new).fits(self._limit + self._limit):
            return
        now_s = time.monotonic()
        self._log(now_s)
        retry_after_s = self.retry_after_s(now_s, num_waiting, num_finished)
        is_long = load.num_seqs + new.num_seqs <= self._limit.num_seqs
        held = (
            f"the prompts there have {load.num_tokens} tokens, the limit is {MAX_PROMPT_TOKENS}"
            if is_long
            else f"{counted(num_waiting, 'sequence')} waiting, the limit is {self._max_queue}"
        )
        raise QueueFullError(
            f"the queue is full: {held}; try again in {retry_after_s} s", retry_after_s
        )

    def retry_after_s(self, now_s: float, num_waiting: int, num_finished: int) -> int:
        """Seconds until the sequences that wait now will have started, at the recent rate.

        A whole number between MIN_RETRY_AFTER_S and MAX_RETRY_AFTER_S.
        """
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
