"""The engine on the event loop: streams, idle, failures, start and stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from pyserve.client import EngineClient, EngineInfo, SequenceRequest
from pyserve.engine import async_engine as async_engine_module
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import Step, StepOutput
from pyserve.engine.engine import Engine, Pending
from pyserve.errors import (
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from pyserve.params import SamplingParams
from tests.engine.fake_runner import VOCAB_SIZE, FakeRunner, expected_tokens, make_engine
from tests.engine.hard_moments import read_all
from tests.waiting import until


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def async_engine(engine: Engine, depth: int = 0, max_queue: int = 1024) -> AsyncEngine:
    info = EngineInfo(
        max_model_len=128, vocab_size=VOCAB_SIZE, max_num_seqs=8, block_size=4, num_blocks=64,
        dtype="float32", device="cpu", max_queue=max_queue,
    )  # fmt: skip
    engine.runner.run_ahead_depth = depth
    return AsyncEngine(engine, info)


def fake(engine: Engine) -> FakeRunner:
    assert isinstance(engine.runner, FakeRunner)
    return engine.runner


class HeldRunner:
    """Executes on a FakeRunner, but tells the results only when it is asked to."""

    run_ahead_depth = 0
    step_deadline_s: float | None = None
    num_device_allocations = 0

    def __init__(self, inner: FakeRunner) -> None:
        self.inner = inner
        self.held: list[tuple[asyncio.Future[StepOutput], StepOutput]] = []

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self.inner.attach(loop)

    def is_replayed(self, step: Step) -> bool:
        return self.inner.is_replayed(step)

    def launch(self, step: Step) -> Pending:
        return Pending(lambda masked_rows: self._sample(step))

    def run(self, step: Step) -> StepOutput:
        return self.inner.run(step)

    def close(self) -> None:
        self.inner.close()

    def tell(self) -> None:
        result, output = self.held.pop(0)
        result.set_result(output)

    def _sample(self, step: Step) -> asyncio.Future[StepOutput]:
        self.held.append((self.inner.loop.create_future(), self.inner.run(step)))
        return self.held[-1][0]


class Clock:
    """The time of an AsyncEngine: it stands still until it is moved, however slow the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.perf_counter = time.perf_counter
        monkeypatch.setattr(async_engine_module, "time", self)

    def monotonic(self) -> float:
        return self.now_s


async def wait_for_step(held: HeldRunner) -> None:
    await until(lambda: held.held)


async def settle() -> None:
    """Until nothing is left to do on the loop: all of these engines' work is done there."""
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.mark.parametrize("max_replayed_tokens", [0, 4, 1000])
@pytest.mark.parametrize("depth", [0, 1])
def test_64_streams_on_8_slots(depth: int, max_replayed_tokens: int) -> None:
    async def test() -> None:
        engine = make_engine(num_blocks=40)
        fake(engine).max_replayed_tokens = max_replayed_tokens
        client: EngineClient = async_engine(engine, depth)
        client.start()
        prompts = [[i, 1, 2, 3, 4, 5] for i in range(64)]
        params = [SamplingParams(max_tokens=1 + i % 20, seed=i) for i in range(64)]
        streams = [
            client.submit(SequenceRequest(*pair)) for pair in zip(prompts, params, strict=True)
        ]
        results = await asyncio.gather(*map(read_all, streams))
        for prompt, param, (token_ids, reason) in zip(prompts, params, results, strict=True):
            assert token_ids == expected_tokens(prompt, param) and reason == "length"
        stats = client.stats()
        assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0
        assert stats.output_tokens == sum(param.max_tokens for param in params)
        assert stats.prompt_tokens == 64 * 6 and stats.error is None
        engine.check_invariants()
        await client.stop()

    run(test())


@pytest.mark.parametrize("is_replayed", [False, True])
def test_what_is_replayed_is_launched_before_tokens_go_out(is_replayed: bool) -> None:
    async def test() -> None:
        engine = make_engine()
        runner = fake(engine)
        client = async_engine(engine, depth=1)
        events: list[str] = []
        runner.on_step = lambda step: events.append("launch")
        runner.max_replayed_tokens = 1000 if is_replayed else 0
        stream = client.submit(SequenceRequest([1, 2], SamplingParams(max_tokens=6, seed=0)))

        async def read() -> None:
            while (await stream.read()).finish_reason is None:
                events.append("token")

        reader = asyncio.create_task(read())
        client.start()
        await reader
        # Two steps are ahead of the first token, which goes out first in any case; then each token
        # and one more launch take turns.
        turns = ["launch", "token"] if is_replayed else ["token", "launch"]
        assert events[: 4 + 2 * 2] == ["launch"] * 2 + ["token", "launch"] + turns * 2
        await client.stop()

    run(test())


@pytest.mark.parametrize("end", ["abort", "stop"])
def test_a_step_that_waits_to_be_launched_when_its_sequence_ends(end: str) -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine, depth=1)
        client.start()
        stream = client.submit(SequenceRequest([1, 2], SamplingParams(max_tokens=90, seed=0)))
        other = client.submit(SequenceRequest([3], SamplingParams(max_tokens=90, seed=5)))
        await stream.read()  # a first token, which nothing is scheduled before
        await stream.read()
        assert client._next_step is not None  # scheduled, and not launched yet
        if end == "stop":
            await client.stop()
            assert fake(engine).is_closed
            return
        client.abort(stream)
        assert (await read_all(stream))[1] == "abort"
        again = client.submit(SequenceRequest([7] * 9, SamplingParams(max_tokens=20, seed=9)))
        expected = expected_tokens([7] * 9, SamplingParams(max_tokens=20, seed=9))
        assert await read_all(again) == (expected, "length")
        expected = expected_tokens([3], SamplingParams(max_tokens=90, seed=5))
        assert await read_all(other) == (expected, "length")
        engine.check_invariants()
        await client.stop()

    run(test())


def test_streams_advance_side_by_side() -> None:
    async def test() -> None:
        engine = make_engine(num_slots=64, max_num_batched_tokens=64 * 5, num_blocks=1000)
        client = async_engine(engine)
        client.start()
        params = SamplingParams(max_tokens=40, seed=1)
        streams = [client.submit(SequenceRequest([i] * 5, params)) for i in range(64)]
        lens = [0] * 64
        while lens[0] < 40:
            await asyncio.sleep(0)
            for index, stream in enumerate(streams):
                delta = stream.take()
                lens[index] += len(delta.token_ids) if delta else 0
            assert len(set(lens)) == 1
        await client.stop()

    run(test())


def test_idle_makes_no_steps_and_wakes_up() -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine)
        client.start()
        await settle()
        assert client.stats().num_steps == 0 and client.stats().step_age_s == 0.0
        for count in (1, 2):
            stream = client.submit(SequenceRequest([1, 2], SamplingParams(max_tokens=4, seed=0)))
            await read_all(stream)
            await settle()
            assert client.stats().num_steps == 4 * count
        assert len(asyncio.all_tasks()) <= 3  # wait_for, this test, the engine
        await client.stop()

    run(test())


def test_the_age_of_a_step_and_an_abort_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    async def test() -> None:
        engine = make_engine()
        runner = HeldRunner(fake(engine))
        engine.runner = runner
        client = async_engine(engine)
        client.start()
        stream = client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=4, seed=0)))
        await wait_for_step(runner)
        clock.now_s += 0.5
        assert client.stats().step_age_s == 0.5
        assert client.stats().num_blocks_used == 3
        client.abort(stream)
        assert client.stats().num_blocks_used == 0
        assert await read_all(stream) == ([], "abort")
        client.abort(stream)
        runner.tell()
        await settle()
        assert client.stats().step_age_s == 0.0 and not runner.held
        await client.stop()

    run(test())


def test_depth_is_how_many_steps_are_launched_ahead() -> None:
    async def test(depth: int) -> None:
        engine = make_engine()
        runner = HeldRunner(fake(engine))
        engine.runner = runner
        client = async_engine(engine, depth)
        client.start()
        stream = client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=6, seed=0)))
        await settle()
        assert len(runner.held) == depth + 1
        while runner.held:
            runner.tell()
            await settle()
        expected = expected_tokens([1] * 10, SamplingParams(max_tokens=6, seed=0))
        assert await read_all(stream) == (expected, "length")
        await client.stop()

    for depth in (0, 1, 2):
        run(test(depth))


def test_the_age_of_a_step_begins_with_the_end_of_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a server that never idles would be taken for one that hangs."""
    clock = Clock(monkeypatch)

    async def test() -> None:
        engine = make_engine()
        engine.runner = runner = HeldRunner(fake(engine))
        client = async_engine(engine, 1)
        client.start()
        client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=20, seed=0)))
        await settle()
        clock.now_s += 0.5
        assert client.stats().step_age_s == 0.5
        runner.tell()
        await settle()
        assert len(runner.held) == 2 and client.stats().step_age_s == 0.0
        stopping = asyncio.ensure_future(client.stop())
        for _ in range(2):
            runner.tell()
        await stopping

    run(test())


def test_tokens_go_out_before_one_more_step_is_launched() -> None:
    async def test() -> None:
        engine = make_engine()
        num_launched: list[Step] = []
        fake(engine).on_step = num_launched.append
        client = async_engine(engine, 1)
        client.start()
        stream = client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=6, seed=0)))
        seen: list[tuple[int, int]] = []
        while not seen or seen[-1][0] < 6:
            delta = await stream.read()
            num_tokens = (seen[-1][0] if seen else 0) + len(delta.token_ids)
            seen.append((num_tokens, len(num_launched)))
        # Of 6 steps each token is read while only the next one runs.
        assert seen == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 6)]
        await client.stop()

    run(test())


def test_stop_fails_what_runs_and_waits_for_the_step() -> None:
    async def test() -> None:
        engine = make_engine(num_slots=1)
        runner = HeldRunner(fake(engine))
        engine.runner = runner
        client = async_engine(engine, 1)
        client.start()
        params = SamplingParams(max_tokens=4, seed=0)
        streams = [client.submit(SequenceRequest([i] * 10, params)) for i in range(2)]
        await settle()
        stopping = asyncio.ensure_future(client.stop())
        for stream in streams:
            with pytest.raises(UnavailableError):
                await read_all(stream)
        with pytest.raises(UnavailableError):
            client.submit(SequenceRequest([1], params))
        await settle()
        assert not stopping.done() and not fake_closed(runner)
        runner.tell()
        runner.tell()
        await stopping
        assert fake_closed(runner) and client.stats().error is None
        await client.stop()

    def fake_closed(runner: HeldRunner) -> bool:
        return runner.inner.is_closed

    run(test())


def test_stop_before_start() -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine)
        await client.stop()
        assert fake(engine).is_closed
        with pytest.raises(UnavailableError):
            client.submit(SequenceRequest([1], SamplingParams(max_tokens=1)))
        with pytest.raises(RuntimeError, match="started once"):
            client.start()
        assert client.stats().error is None
        await client.stop()

    run(test())


def test_a_bad_request_is_refused_at_once() -> None:
    async def test() -> None:
        client = async_engine(make_engine())
        client.start()
        with pytest.raises(InvalidRequestError, match="the limit is 128 tokens"):
            client.submit(SequenceRequest([1] * 100, SamplingParams(max_tokens=29)))
        assert client.stats().num_waiting == 0
        assert client.info.max_model_len == 128
        await client.stop()

    run(test())


def test_the_loop_is_free_while_a_step_runs() -> None:
    async def test() -> None:
        engine = make_engine()
        runner = HeldRunner(fake(engine))
        engine.runner = runner
        client = async_engine(engine)
        client.start()
        client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=4, seed=0)))
        await asyncio.sleep(0)
        start = time.perf_counter()
        for _ in range(100):
            await asyncio.sleep(0)
        assert time.perf_counter() - start < 10
        runner.tell()
        stopping = asyncio.ensure_future(client.stop())
        while not stopping.done():
            await asyncio.sleep(0.005)
            if runner.held:
                runner.tell()

    run(test())


def test_a_full_queue_refuses_and_those_inside_end_well() -> None:
    async def test() -> None:
        engine = make_engine(num_blocks=64)
        client = async_engine(engine, max_queue=3)
        client.start()
        params = SamplingParams(max_tokens=4)
        streams = [client.submit(SequenceRequest([1, 2, number], params)) for number in range(9)]
        client.check_room(2)
        with pytest.raises(QueueFullError):
            client.check_room(3)  # all or none
        streams += [client.submit(SequenceRequest([1, 2, number], params)) for number in (9, 10)]
        with pytest.raises(QueueFullError) as caught:
            client.submit(SequenceRequest([1], params))
        assert caught.value.retry_after_s >= 1
        assert engine.num_seqs == 11
        for stream in streams:
            assert (await read_all(stream))[1] == "length"
        for _ in range(2):
            client.check_room(8)  # as many as there are slots, of one request
        with pytest.raises(InvalidRequestError, match="9 sequences, this server takes 8 of one"):
            client.check_room(9)
        await client.stop()
        with pytest.raises(UnavailableError):
            client.check_room(1)

    run(test())
