"""The engine on the event loop with constrained sequences: the order of things, aborts, ends."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from pathlib import Path

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import Step
from pyserve.engine.engine import Pending
from pyserve.engine.trace import Trace
from pyserve.errors import EngineError, UnavailableError
from pyserve.params import SamplingParams
from tests.engine.constraints import Scripted, windows
from tests.engine.fake_runner import VOCAB_SIZE, FakeRunner, expected_tokens, make_engine
from tests.engine.hard_moments import read_all
from tests.engine.test_async_engine import async_engine, fake, run, settle
from tests.engine.test_trace import read
from tests.waiting import until

RULE = windows(VOCAB_SIZE, 3)
PARAMS = SamplingParams(max_tokens=12, seed=4)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_streams_with_and_without_constraints(depth: int) -> None:
    async def test() -> None:
        engine = make_engine(num_blocks=40)
        client = async_engine(engine, depth)
        client.start()
        params = [SamplingParams(max_tokens=1 + i % 20, seed=i) for i in range(30)]
        constraints = [Scripted(RULE) if i % 3 else None for i in range(30)]
        streams = [
            client.submit(SequenceRequest([i, 1, 2, 3], param, constraint=constraint))
            for i, (param, constraint) in enumerate(zip(params, constraints, strict=True))
        ]
        results = await asyncio.gather(*map(read_all, streams))
        for i, (token_ids, reason) in enumerate(results):
            rule = RULE if i % 3 else lambda output: None
            assert token_ids == expected_tokens([i, 1, 2, 3], params[i], rule)
            assert reason == "length"
        engine.check_invariants()
        await client.stop()

    run(test())


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_aborts_and_preemptions_leave_constraints_as_their_outputs_are(depth: int) -> None:
    async def one(client: AsyncEngine, rng: random.Random) -> str:
        prompt = [rng.randrange(4)] * rng.randrange(1, 30)
        params = SamplingParams(max_tokens=rng.randrange(1, 30), seed=rng.randrange(9))
        constraint = Scripted(RULE) if rng.random() < 0.7 else None
        rule = RULE if constraint else lambda output: None
        num_reads = rng.randrange(40)  # before it is aborted
        for _ in range(rng.randrange(50)):
            await asyncio.sleep(0)
        stream = client.submit(SequenceRequest(prompt, params, constraint=constraint))
        output: list[int] = []
        while True:
            delta = await stream.read()
            output += delta.token_ids
            num_reads -= 1
            if not num_reads:
                client.abort(stream)
            if delta.finish_reason is not None:
                break
        assert output == expected_tokens(prompt, params, rule)[: len(output)]
        assert constraint is None or constraint.history == output
        return delta.finish_reason

    async def test() -> None:
        engine = make_engine(num_blocks=20, num_slots=6, max_num_batched_tokens=14)
        client = async_engine(engine, depth)
        client.start()
        reasons = await asyncio.gather(
            *(one(client, random.Random(f"{depth} {i}")) for i in range(150))
        )
        assert set(reasons) == {"length", "abort"}
        engine.check_invariants()
        assert engine.scheduler.num_preemptions > 10 and client.stats().num_blocks_used == 0
        await client.stop()

    run(test())


class Recorded:
    """A FakeRunner's launches, by name."""

    def __init__(self, runner: FakeRunner) -> None:
        self.events: list[str] = []
        launch = runner.launch
        runner.on_step = lambda step: self.events.append("sample")

        def recorded(step: Step) -> Pending:
            self.events.append("forward")
            return launch(step)

        runner.launch = recorded  # type: ignore[method-assign]


def test_the_next_forward_pass_runs_while_masks_are_filled() -> None:
    async def test() -> None:
        engine = make_engine()
        events = Recorded(fake(engine)).events
        client = async_engine(engine, depth=1)
        client.start()
        constraint = Scripted(RULE, on_fill=lambda: events.append("mask"))
        stream = client.submit(SequenceRequest([1, 2], PARAMS, constraint=constraint))
        await read_all(stream)
        await client.stop()
        # The fifth and the tenth token are free: their steps wait for nothing but the tokens.
        masked = ["forward", "mask", "sample"]
        assert events == masked * 4 + ["forward", "sample"] + masked * 4 + ["forward", "sample"] + (
            masked * 2
        )

    run(test())


def test_a_step_without_constraints_is_launched_whole_and_ahead() -> None:
    async def test() -> None:
        engine = make_engine()
        recorded = Recorded(fake(engine))
        client = async_engine(engine, depth=1)
        client.start()
        await read_all(client.submit(SequenceRequest([1, 2], PARAMS)))
        assert recorded.events == ["forward", "sample"] * 12
        await client.stop()

    run(test())


class Gate:
    """Holds the thread that fills a mask until it is opened."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.is_reached.set()
        assert self.opened.wait(60)

    async def reached(self) -> None:
        await until(self.is_reached.is_set)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_loop_is_free_and_an_abort_counts_while_masks_are_filled(depth: int) -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine, depth)
        client.start()
        gate = Gate()
        held = Scripted(RULE, on_fill=gate)
        stream = client.submit(SequenceRequest([1, 2], PARAMS, constraint=held))
        other = Scripted(RULE)
        beside = client.submit(SequenceRequest([3], PARAMS, constraint=other))
        await gate.reached()
        assert client.stats().step_age_s > 0.0
        client.abort(stream)
        assert await read_all(stream) == ([], "abort")
        gate.opened.set()
        assert await read_all(beside) == (expected_tokens([3], PARAMS, RULE), "length")
        assert held.history == [] and client.stats().num_blocks_used == 0
        engine.check_invariants()
        await client.stop()

    run(test())


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_next_step_is_scheduled_while_masks_are_filled(depth: int) -> None:
    """Where it would be launched before the result of this one is known, and else not."""

    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine, depth)
        client.start()
        gate = Gate()
        constraint = Scripted(RULE, on_fill=gate)
        stream = client.submit(SequenceRequest([1, 2], PARAMS, constraint=constraint))
        await gate.reached()
        await settle()
        assert (client._next_step is not None) == (depth > 0)
        assert len(client._in_flight) == 1  # it is not launched before
        gate.opened.set()
        assert await read_all(stream) == (expected_tokens([1, 2], PARAMS, RULE), "length")
        await client.stop()

    run(test())


@pytest.mark.parametrize("depth", [0, 1])
def test_stop_while_masks_are_filled(depth: int) -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine, depth)
        client.start()
        gate = Gate()
        constraint = Scripted(RULE, on_fill=gate, broken_at=0)  # its failure comes after the end
        stream = client.submit(SequenceRequest([1, 2], PARAMS, constraint=constraint))
        await gate.reached()
        stopping = asyncio.ensure_future(client.stop())
        with pytest.raises(UnavailableError):
            await read_all(stream)
        assert not stopping.done() and not fake(engine).is_closed
        gate.opened.set()
        await stopping
        assert fake(engine).is_closed and client.stats().error is None

    run(test())


@pytest.mark.parametrize("depth", [0, 1])
def test_a_step_that_fails_takes_its_constrained_sequences_with_it(depth: int) -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine, depth)
        client.start()
        num_steps = 0

        def fail_once(step: Step) -> None:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 3:
                raise RuntimeError("as wanted")

        fake(engine).on_step = fail_once
        constraint = Scripted(RULE)
        stream = client.submit(SequenceRequest([1, 2], PARAMS, constraint=constraint))
        with pytest.raises(EngineError):
            await read_all(stream)
        assert len(constraint.history) == 2
        again = client.submit(SequenceRequest([1, 2], PARAMS, constraint=Scripted(RULE)))
        assert await read_all(again) == (expected_tokens([1, 2], PARAMS, RULE), "length")
        engine.check_invariants()
        await client.stop()

    run(test())


def test_the_time_that_masks_take_is_in_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    async def test() -> None:
        engine = make_engine()
        client = AsyncEngine(engine, async_engine(engine, depth=1).info, Trace(path))
        client.start()
        constraint = Scripted(lambda output: [1, 2], on_fill=lambda: time.sleep(0.01))
        await read_all(client.submit(SequenceRequest([1], PARAMS, constraint=constraint)))
        await client.stop()

    run(test())
    events = read(path)
    spans = [event for event in events if event["name"] == "mask"]
    assert len(spans) == 12 and all(event["dur"] >= 10_000 for event in spans)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert all(tracks[event["tid"]].startswith("mask") for event in spans)
