"""SequenceStream: what the engine writes is what the reader gets, in order, once."""

from __future__ import annotations

import asyncio
import time

import pytest

from pyserve.client import SequenceStream
from pyserve.errors import EngineError


def make_stream() -> SequenceStream:
    return SequenceStream(seq_id=0, num_prompt_tokens=3)


def test_a_late_reader_takes_all_at_once() -> None:
    async def run() -> None:
        stream = make_stream()
        stream.put([1])
        stream.put([2])
        assert (await stream.read()).token_ids == [1, 2]
        assert stream.take() is None
        stream.put([3])
        stream.finish("stop", 3)
        delta = await stream.read()
        assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ([3], "stop", 3)

    asyncio.run(run())


def test_read_waits() -> None:
    async def run() -> None:
        stream = make_stream()
        asyncio.get_running_loop().call_later(0.01, stream.put, [7])
        delta = await asyncio.wait_for(stream.read(), 30)
        assert delta.token_ids == [7] and delta.finish_reason is None

    asyncio.run(run())


def test_an_error_comes_after_what_was_delivered() -> None:
    async def run() -> None:
        stream = make_stream()
        stream.put([1])
        stream.fail(EngineError("broken"))
        assert stream.is_finished
        delta = await stream.read()
        assert delta.token_ids == [1] and delta.finish_reason is None
        with pytest.raises(EngineError, match="broken"):
            await stream.read()

    asyncio.run(run())


def test_a_read_after_the_end_tells_it_again() -> None:
    async def run() -> None:
        ended, failed = make_stream(), make_stream()
        ended.put([1])
        ended.finish("length")
        failed.fail(EngineError("broken"))
        for expected in ([1], [], []):
            delta = await asyncio.wait_for(ended.read(), 30)
            assert (delta.token_ids, delta.finish_reason) == (expected, "length")
        for _ in range(3):
            with pytest.raises(EngineError, match="broken"):
                await asyncio.wait_for(failed.read(), 30)

    asyncio.run(run())


def test_streams_share_one_wakeup() -> None:
    async def run() -> None:
        wakeup = asyncio.Event()
        streams = [make_stream(), make_stream()]
        streams[0].put([5])  # before it is shared: not lost
        for stream in streams:
            stream.share_wakeup(wakeup)
        assert wakeup.is_set()
        wakeup.clear()
        asyncio.get_running_loop().call_later(0.01, streams[1].finish, "length")
        await asyncio.wait_for(wakeup.wait(), 30)
        first, second = (stream.take() for stream in streams)
        assert first is not None and first.token_ids == [5]
        assert second is not None and second.finish_reason == "length"

    asyncio.run(run())


def test_an_error_wakes_the_shared_reader_again() -> None:
    wakeup = asyncio.Event()
    stream = make_stream()
    stream.share_wakeup(wakeup)
    stream.put([1])
    stream.fail(EngineError("broken"))
    wakeup.clear()
    assert stream.take() is not None
    assert wakeup.is_set()


def test_nothing_comes_after_the_end() -> None:
    stream = make_stream()
    stream.finish("abort")
    with pytest.raises(AssertionError):
        stream.put([1])
    with pytest.raises(AssertionError):
        stream.finish("stop")
    with pytest.raises(AssertionError):
        stream.fail(EngineError("late"))


@pytest.mark.parametrize("is_failed", [False, True])
def test_a_stream_knows_when_it_was_queued_scheduled_and_ended(is_failed: bool) -> None:
    before_s = time.monotonic()
    stream = make_stream()
    assert stream.queued_s >= before_s and stream.scheduled_s == stream.ended_s == 0.0
    stream.admit(2)
    assert stream.num_cached_tokens == 2
    if is_failed:
        stream.fail(EngineError("broken"))
    else:
        stream.finish("length")
    assert stream.queued_s <= stream.scheduled_s <= stream.ended_s <= time.monotonic()
