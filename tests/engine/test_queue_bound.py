"""How many sequences may wait, and what a refusal says."""

from __future__ import annotations

import pytest

from pyserve.engine.queue_bound import MAX_RETRY_AFTER_S, RATE_WINDOW_S, QueueBound
from pyserve.errors import InvalidRequestError, QueueFullError


def test_slots_and_queue_are_the_limit_all_or_none() -> None:
    bound = QueueBound(max_queue=2, num_slots=3)
    bound.check(5, num_seqs=0, num_waiting=0, num_finished=0)
    bound.check(1, num_seqs=4, num_waiting=1, num_finished=0)
    for num_new, num_seqs in ((1, 5), (2, 4), (5, 1)):
        with pytest.raises(QueueFullError) as caught:
            bound.check(num_new, num_seqs=num_seqs, num_waiting=2, num_finished=0)
        assert caught.value.status == 429 and caught.value.retry_after_s >= 1
        assert "the limit is 2" in caught.value.message


def test_what_can_never_enter_is_not_told_to_come_again() -> None:
    bound = QueueBound(max_queue=2, num_slots=3)
    with pytest.raises(InvalidRequestError, match="makes 6 sequences, this server takes 5"):
        bound.check(6, num_seqs=0, num_waiting=0, num_finished=0)


def test_retry_after_follows_the_recent_rate() -> None:
    bound = QueueBound(max_queue=100, num_slots=8)
    now = 1000.0
    assert bound.retry_after_s(now, 100, 0) == 1  # nothing known
    for second in range(60):  # 4 a second, then 10
        bound.note(now, 4 * min(second, 30) + 10 * max(second - 30, 0))
        now += 1.0
    finished = 4 * 30 + 10 * 30
    assert bound.retry_after_s(now, 100, finished) == 10
    assert bound.retry_after_s(now, 3, finished) == 1
    assert bound.retry_after_s(now, 10**6, finished) == MAX_RETRY_AFTER_S
    late = now + RATE_WINDOW_S - 5  # nothing has ended since
    assert 10 < bound.retry_after_s(late, 50, finished) <= MAX_RETRY_AFTER_S


def test_a_queue_that_stands_still_asks_for_the_longest_wait() -> None:
    bound = QueueBound(max_queue=100, num_slots=8)
    for second in range(10):
        bound.note(float(second), 5)
    assert bound.retry_after_s(10.0, 1, 5) == MAX_RETRY_AFTER_S


def test_refusals_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    bound = QueueBound(max_queue=1, num_slots=1)
    for _ in range(50):
        with pytest.raises(QueueFullError):
            bound.check(1, num_seqs=2, num_waiting=1, num_finished=0)
    assert len(caplog.records) == 1 and "429" in caplog.text
