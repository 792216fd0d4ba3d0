"""AsyncEngine where a step fails, hangs or cannot be trusted any more."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine import async_engine as async_engine_module
from pyserve.engine.async_engine import MAX_FAILED_STEPS, AsyncEngine
from pyserve.engine.batch import Asked, Step, StepOutput, StepShape
from pyserve.engine.cpu_runner import CpuRunner
from pyserve.errors import DeviceError, EngineError, UnavailableError
from pyserve.params import SamplingParams
from tests.engine.fake_runner import expected_tokens, make_engine
from tests.engine.hard_moments import read_all
from tests.engine.test_async_engine import (
    Clock,
    HeldRunner,
    async_engine,
    fake,
    run,
    wait_for_step,
)
from tests.waiting import until


def test_a_failed_step_fails_its_sequences_and_the_engine_goes_on() -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine)
        client.start()
        gave_up = asyncio.ensure_future(client.wait_stopped())
        params = SamplingParams(max_tokens=4, seed=0)
        for _ in range(2 * MAX_FAILED_STEPS):  # never twice without success in between
            steps: list[Step] = []

            def fail_once(step: Step, steps: list[Step] = steps) -> None:
                steps.append(step)
                if len(steps) == 2:
                    raise RuntimeError("as wanted")

            fake(engine).on_step = fail_once
            with pytest.raises(EngineError, match="step"):
                await read_all(client.submit(SequenceRequest([1] * 10, params)))
            assert await read_all(client.submit(SequenceRequest([2] * 10, params))) == (
                expected_tokens([2] * 10, params), "length",
            )  # fmt: skip
        assert client.stats().error is None and client.stats().num_blocks_used == 0
        await client.stop()
        assert not gave_up.done()
        gave_up.cancel()

    run(test())


def test_a_lost_device_stops_the_engine_at_once() -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine)
        client.start()

        def fail(step: Step) -> None:
            raise DeviceError("the GPU failed: CUDA_ERROR_ILLEGAL_ADDRESS")

        fake(engine).on_step = fail
        params = SamplingParams(max_tokens=4, seed=0)
        streams = [client.submit(SequenceRequest([i] * 10, params)) for i in range(3)]
        results = await asyncio.gather(*map(read_all, streams), return_exceptions=True)
        assert {str(result) for result in results} == {"the GPU failed: CUDA_ERROR_ILLEGAL_ADDRESS"}
        assert await client.wait_stopped() == "the GPU failed: CUDA_ERROR_ILLEGAL_ADDRESS"
        assert client.stats().num_steps == 0
        with pytest.raises(UnavailableError, match="ILLEGAL_ADDRESS"):
            client.submit(SequenceRequest([1], params))
        await client.stop()

    run(test())


def test_a_lost_device_with_steps_in_flight_leaves_no_traceback() -> None:
    """What the steps behind the failed one come to is asked by nobody, and told to nobody."""
    problems: list[dict[str, Any]] = []

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: problems.append(context)
        )
        engine = make_engine()
        engine.runner = held = HeldRunner(fake(engine))
        client = async_engine(engine, 2)
        client.start()
        stream = client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=20, seed=0)))
        await wait_for_step(held)
        assert len(held.held) == 3
        for result, _ in held.held[:2]:
            result.set_exception(DeviceError("the GPU failed: CUDA_ERROR_X"))
        held.held.clear()
        with pytest.raises(EngineError, match="CUDA_ERROR_X"):
            await read_all(stream)
        await client.stop()

    run(test())
    gc.collect()
    assert problems == []


async def wait_for_look(client: AsyncEngine, clock: Clock) -> None:
    await until(lambda: client._looked_s >= clock.now_s)


def test_time_in_which_an_idle_process_stood_still_is_no_time_of_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(async_engine_module, "LOOK_S", 0.05)
    clock = Clock(monkeypatch)

    async def test() -> None:
        engine = make_engine()
        engine.runner = held = HeldRunner(fake(engine))
        held.step_deadline_s = 10.0
        client = async_engine(engine, 0)
        client.start()
        clock.now_s += 0.5
        client.submit(SequenceRequest([1, 2, 3], SamplingParams(max_tokens=1, seed=0)))
        await wait_for_step(held)
        assert client.stats().step_age_s == 0.0
        await wait_for_look(client, clock)
        assert client.stats().step_age_s == 0.0
        held.tell()
        await client.stop()

    run(test())


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_beyond_its_deadline_stops_the_engine(depth: int) -> None:
    async def test() -> None:
        engine = make_engine()
        engine.runner = held = HeldRunner(fake(engine))
        held.step_deadline_s = 0.1
        client = async_engine(engine, depth)
        client.start()
        stream = client.submit(SequenceRequest([1, 2, 3], SamplingParams(max_tokens=4, seed=0)))
        await wait_for_step(held)
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(EngineError, match="hangs: a step has not ended after 0"):
            await read_all(stream)
        assert asyncio.get_running_loop().time() - began_s < 10
        assert "hangs" in await client.wait_stopped()
        await asyncio.wait_for(client.stop(), 10)
        assert not held.inner.is_closed, "what hangs may still use its memory"

    run(test())


def test_time_in_which_the_process_stood_still_is_no_time_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGSTOP, docker pause, a suspended machine: a step may end before anybody looks again."""
    monkeypatch.setattr(async_engine_module, "LOOK_S", 0.05)
    clock = Clock(monkeypatch)

    async def test() -> None:
        engine = make_engine()
        engine.runner = held = HeldRunner(fake(engine))
        held.step_deadline_s = 0.3
        client = async_engine(engine, 0)
        client.start()
        stream = client.submit(SequenceRequest([1, 2, 3], SamplingParams(max_tokens=2, seed=0)))
        await wait_for_step(held)
        clock.now_s += 1.0  # nothing of this process ran, as far as the engine can tell
        await wait_for_look(client, clock)
        assert client.stats().error is None
        assert client.stats().step_age_s < 0.3, "nor does /health take it for one that hangs"
        held.tell()
        await wait_for_step(held)
        held.tell()
        assert (await read_all(stream))[1] == "length"
        stream = client.submit(SequenceRequest([1, 2, 3], SamplingParams(max_tokens=2, seed=0)))
        await wait_for_step(held)
        clock.now_s += 1.0
        await wait_for_look(client, clock)
        for _ in range(3):
            clock.now_s += 0.08
            await wait_for_look(client, clock)
        assert client.stats().error is None
        clock.now_s += 0.08
        with pytest.raises(EngineError, match="hangs"):
            await read_all(stream)  # it still is one where it never ends
        await client.stop()

    run(test())


def test_failure_after_failure_stops_the_engine() -> None:
    async def test() -> None:
        engine = make_engine(num_slots=1)
        client = async_engine(engine)
        client.start()

        def fail(step: Step) -> None:
            raise RuntimeError("as wanted")

        fake(engine).on_step = fail
        params = SamplingParams(max_tokens=4, seed=0)
        streams = [
            client.submit(SequenceRequest([i] * 10, params)) for i in range(MAX_FAILED_STEPS + 2)
        ]
        results = await asyncio.gather(*map(read_all, streams), return_exceptions=True)
        assert {type(result) for result in results} == {EngineError}
        assert "as wanted" not in str(results), "what failed inside is for the log"
        error = client.stats().error
        assert error is not None and "3 steps in a row" in error
        assert await client.wait_stopped() == error
        with pytest.raises(UnavailableError, match="3 steps in a row"):
            client.submit(SequenceRequest([1], params))
        for stream in streams:
            client.abort(stream)
        await client.stop()
        assert fake(engine).is_closed

    run(test())


def test_a_bug_ends_every_stream_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine)
        client.start()
        stream = client.submit(SequenceRequest([1, 2], SamplingParams(max_tokens=4, seed=0)))

        def broken(step: Step, output: StepOutput) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(engine, "update", broken)
        with pytest.raises(EngineError, match="the engine has stopped: KeyError"):
            await read_all(stream)
        assert await client.wait_stopped() == "the engine has stopped: KeyError"
        assert client.stats().error is not None
        with pytest.raises(UnavailableError):
            client.submit(SequenceRequest([1], SamplingParams(max_tokens=1)))
        await client.stop()

    run(test())


@pytest.mark.parametrize("is_failed", [True, False])
def test_a_step_on_a_cpu_may_be_failed_before_it_ends(
    is_failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another rank is lost. Its end, by an error of the group, is no news then."""
    may_end = threading.Event()
    told: list[dict[str, Any]] = []

    def sample(*given: object) -> StepOutput:
        assert may_end.wait(30)
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(CpuRunner, "_sample", sample)
    runner = object.__new__(CpuRunner)

    async def test() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: told.append(context))
        forward: Future[StepShape] = Future()
        result = runner._start_sampling(loop, forward, Asked([], [], []))
        if is_failed:
            result.set_exception(DeviceError("rank 1 has gone"))
        may_end.set()
        with pytest.raises(DeviceError if is_failed else RuntimeError):
            await result
        await asyncio.wrap_future(runner._thread.submit(int))
        await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as runner._thread:
        asyncio.run(test())
    assert not told
