"""How many sequences may wait, and what a refusal says."""

from __future__ import annotations

import asyncio

import pytest

from pyserve.client import EngineInfo, SequenceRequest
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.queue_bound import (
    MAX_PROMPT_TOKENS,
    MAX_RETRY_AFTER_S,
    RATE_WINDOW_S,
    Load,
    QueueBound,
)
from pyserve.errors import InvalidRequestError, QueueFullError
from pyserve.params import SamplingParams
from tests.engine.fake_runner import VOCAB_SIZE, make_engine
from tests.waiting import until


def check(
    bound: QueueBound, new: Load, load_of: dict[str, Load], *, user: str = "", num_waiting: int = 2
) -> None:
    load = sum(load_of.values(), Load())
    bound.check(new, load_of=load_of, load=load, user=user, num_waiting=num_waiting, num_finished=0)


def test_slots_and_queue_are_the_limit_all_or_none() -> None:
    bound = QueueBound(max_queue=2, num_slots=3)
    check(bound, Load(3), {"": Load(2)})
    check(bound, Load(1), {"": Load(4)})
    for num_new, num_seqs in ((1, 5), (2, 4), (3, 3)):
        with pytest.raises(QueueFullError) as caught:
            check(bound, Load(num_new), {"": Load(num_seqs)})
        assert caught.value.status == 429 and caught.value.retry_after_s >= 1
        assert "the limit is 2" in caught.value.message


def test_the_tokens_of_what_waits_have_a_limit() -> None:
    bound = QueueBound(max_queue=1000, num_slots=3)
    half = MAX_PROMPT_TOKENS // 2
    check(bound, Load(1, half), {"": Load(4, half)})
    with pytest.raises(QueueFullError, match=f"have {half} tokens, the limit is {2 * half}"):
        check(bound, Load(1, half + 1), {"": Load(4, half)})
    check(bound, Load(1, half), {"a": Load(4, 2 * half)}, user="b")
    with pytest.raises(QueueFullError):
        check(bound, Load(1, half + 1), {"a": Load(4, 2 * half)}, user="b")


def test_one_request_does_not_get_all_places() -> None:
    """10 prompts times n 128 took the 1,280 places of a server of default size."""
    bound = QueueBound(max_queue=1024, num_slots=256)
    check(bound, Load(640), {})
    with pytest.raises(InvalidRequestError, match="makes 641 sequences, this server takes 640 of"):
        check(bound, Load(641), {})
    small = QueueBound(max_queue=2, num_slots=3)
    check(small, Load(3), {})
    with pytest.raises(InvalidRequestError, match="makes 4 sequences, this server takes 3 of one"):
        check(small, Load(4), {})


def test_who_comes_to_a_full_queue_gets_an_equal_share() -> None:
    bound = QueueBound(max_queue=60, num_slots=40)
    load_of = {"hog": Load(100)}
    for number in range(50):
        check(bound, Load(1), load_of, user="new")
        load_of["new"] = Load(number + 1)
    for user in ("new", "hog"):
        with pytest.raises(QueueFullError):
            check(bound, Load(1), load_of, user=user)
    check(bound, Load(33), load_of, user="third")
    load_of["third"] = Load(33)
    for number in range(17):  # to twice the limit, and no further
        check(bound, Load(1), load_of, user=f"more {number}")
        load_of[f"more {number}"] = Load(1)
    with pytest.raises(QueueFullError):
        check(bound, Load(1), load_of, user="last")


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
            check(bound, Load(1), {"": Load(2)}, num_waiting=1)
    assert len(caplog.records) == 1 and "429" in caplog.text


def test_a_queue_that_one_user_has_filled_takes_the_others() -> None:
    async def test() -> None:
        engine = make_engine(num_blocks=64)
        info = EngineInfo(
            max_model_len=128, vocab_size=VOCAB_SIZE, max_num_seqs=8, block_size=4, num_blocks=64,
            dtype="float32", device="cpu", max_queue=8,
        )  # fmt: skip
        client = AsyncEngine(engine, info)
        client.start()
        params = SamplingParams(max_tokens=30)
        hog = [client.submit(SequenceRequest([1, 2, i], params, user="hog")) for i in range(16)]
        with pytest.raises(QueueFullError):
            client.check_room(1, user="hog")
        await until(lambda: len(engine.scheduler.running) == 8, pause_s=0.0)
        stream = client.submit(SequenceRequest([5], SamplingParams(max_tokens=3), user="other"))
        while not stream.is_finished:
            await stream.read()
        assert not any(stream.is_finished for stream in hog), "they take 30 steps, it took 4"
        await client.stop()

    asyncio.run(asyncio.wait_for(test(), 20))
