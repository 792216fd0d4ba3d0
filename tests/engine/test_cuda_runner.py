"""CudaRunner without a card: its life, on a CPU that stands in for the device and its driver.

What it does on a real one is in tests/gpu.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pyserve.client import Adapter, EngineInfo, SequenceRequest, SequenceStream, TokenLogprobs
from pyserve.engine import cuda_runner
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import Step
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine
from pyserve.errors import DeviceError, EngineError
from pyserve.params import SamplingParams
from tests.engine import test_adapters_on_a_model as adapted
from tests.engine.after_the_end import stop_and_check
from tests.engine.constraints import Scripted, always
from tests.engine.fake_card import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    NUM_SLOTS,
    FakeStream,
    make_engine,
    take_card,
)
from tests.engine.hard_moments import read_all
from tests.engine.test_adapters_on_a_model import make_decoder as make_adapted
from tests.engine.test_adapters_on_a_model import make_engine as make_adapted_engine
from tests.engine.test_adapters_on_a_model import make_weights
from tests.engine.tiny import VOCAB_SIZE


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    return make_engine(monkeypatch, tmp_path)


def start(engine: Engine) -> AsyncEngine:
    """`engine` on the loop that runs."""
    info = EngineInfo(
        max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=NUM_SLOTS,
        block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32", device="cuda",
    )  # fmt: skip
    client = AsyncEngine(engine, info)
    client.start()
    return client


def test_a_step_that_cannot_be_launched_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its forward or in its sampling; the ring has its entry again, and the next step runs."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("as wanted")

    async def run() -> None:
        runner.attach(asyncio.get_running_loop())
        params = SamplingParams(max_tokens=200, temperature=0.0)
        for half in 2 * ("forward", "sample"):
            for is_broken in (True, False):
                stream = engine.add(SequenceRequest([1] * 10, params))
                step = engine.schedule()
                assert step is not None
                with monkeypatch.context() as patch:
                    if is_broken:
                        patch.setattr(runner._executor, half, fail)
                    result = runner.launch(step).sample()
                if is_broken:
                    with pytest.raises(RuntimeError, match="as wanted"):
                        await result
                else:
                    assert len((await result).token_ids) == 1
                assert len(runner._ring) == cuda_runner.RING_SIZE
                engine.abort(stream)

    asyncio.run(asyncio.wait_for(run(), 60))
    runner.close()


@pytest.mark.parametrize("tile_rows", [1, 3, NUM_SLOTS])
def test_masks_are_brought_to_the_rows_that_they_are_of(engine: Engine, tile_rows: int) -> None:
    """The device keeps its own copies, and a step without masks is not touched by the last ones."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    state = runner._executor._state
    state.logits, state.hidden = state.logits[:tile_rows], state.hidden[:tile_rows]

    async def run() -> None:
        client = start(engine)
        params = SamplingParams(max_tokens=20, temperature=0.0)
        for numbers in ([0, None, 2, 3], [None, None, None, None], [None, 1, None, 2]):
            constraints = [
                None if number is None else Scripted(always(9 * number, 9 * number + 40))
                for number in numbers
            ]
            streams = [
                client.submit(SequenceRequest([1 + i] * 10, params, constraint=constraint))
                for i, constraint in enumerate(constraints)
            ]
            for i, (stream, number) in enumerate(zip(streams, numbers, strict=True)):
                token_ids, _ = await read_all(stream)
                if number is not None:
                    assert set(token_ids) <= {9 * number, 9 * number + 40}
                else:
                    alone = client.submit(SequenceRequest([1 + i] * 10, params))
                    assert (await read_all(alone))[0] == token_ids
        await client.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("tile_rows", [1, 3, NUM_SLOTS])
def test_logprobs_come_back_to_the_rows_that_ask(engine: Engine, tile_rows: int) -> None:
    """While the next step is in flight, beside masks, and with prompts in several chunks."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    state = runner._executor._state
    state.logits, state.hidden = state.logits[:tile_rows], state.hidden[:tile_rows]

    async def told_of(stream: SequenceStream) -> list[TokenLogprobs]:
        told: list[TokenLogprobs] = []
        while True:
            delta = await stream.read()
            told += delta.logprobs or []
            if delta.finish_reason is not None:
                return [*stream.prompt_logprobs, *told]

    async def run() -> None:
        client = start(engine)

        def submit(number: int) -> SequenceStream:
            params = SamplingParams(
                max_tokens=20, temperature=0.0, num_logprobs=None if number == 1 else 5,
                num_prompt_logprobs=2 if number > 1 else None,
            )  # fmt: skip
            constraint = Scripted(always(9, 40)) if number == 2 else None
            prompt = [1 + number] * (10 + 10 * number)
            return client.submit(SequenceRequest(prompt, params, constraint=constraint))

        together = [submit(number) for number in range(NUM_SLOTS)]
        told = [await told_of(stream) for stream in together]
        assert [len(entries) for entries in told] == [20, 0, 29 + 20, 39 + 20]
        for number, entries in enumerate(told):
            alone = await told_of(submit(number))
            for entry, expected in zip(entries, alone, strict=True):
                assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)
                assert entry.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)
        await client.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("half", ["forward", "_sample"])
def test_a_constrained_step_that_cannot_be_launched_fails_alone(
    engine: Engine, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    call, num_calls = getattr(runner._executor, half), 0

    def fail_once(*args: object, **kwargs: object) -> object:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("as wanted")
        return call(*args, **kwargs)

    monkeypatch.setattr(runner._executor, half, fail_once)

    async def run() -> None:
        client = start(engine)
        params = SamplingParams(max_tokens=20, temperature=0.0)
        constraint = Scripted(lambda output: [3, 4])
        with pytest.raises(EngineError):
            await read_all(client.submit(SequenceRequest([1], params, constraint=constraint)))
        assert constraint.history == []
        again = client.submit(SequenceRequest([1], params, constraint=constraint))
        token_ids, _ = await read_all(again)
        assert constraint.history == token_ids and len(token_ids) == 20
        await client.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_adapters_are_put_in_behind_the_steps_that_use_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With fewer slots than adapters, and a step in flight: the tokens of a CPU's runner."""
    adapters = [
        None if number is None else Adapter(f"a{number}", number, make_weights(decoder, number))
        for decoder in (make_adapted(1),)
        for number in (None, 1, 2, 3, 4)
    ]

    async def answers(depth: int) -> list[list[int]]:
        engine = make_adapted_engine(make_adapted(2))
        engine.runner.run_ahead_depth = depth
        client = start(engine)
        params = SamplingParams(max_tokens=20, temperature=0.0)
        streams = [
            client.submit(SequenceRequest([3, 1, 4, 1, 5], params, adapter=adapter))
            for adapter in (*adapters, *adapters)
        ]
        outputs = [(await read_all(stream))[0] for stream in streams]
        assert engine.scheduler.adapters.num_loads >= 4
        await client.stop()
        return outputs

    expected = asyncio.run(asyncio.wait_for(answers(0), 60))
    assert len({tuple(output) for output in expected}) == len(adapters), "they matter"
    take_card(monkeypatch)
    monkeypatch.setattr(
        adapted, "CpuRunner", lambda executor, num_threads: CudaRunner(executor, is_eager=True)
    )
    for depth in (0, 1):
        assert asyncio.run(asyncio.wait_for(answers(depth), 60)) == expected


def test_a_record_that_fails_says_whether_the_device_is_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine.runner
    assert isinstance(runner, CudaRunner)

    def fail(*args: object) -> None:
        raise RuntimeError("as wanted")

    monkeypatch.setattr(runner._executor, "record", fail)
    with pytest.raises(RuntimeError, match="as wanted"):
        runner.allocate_kv(NUM_BLOCKS)
    monkeypatch.setattr(FakeStream, "synchronize", fail)
    monkeypatch.setattr(runner, "_run_and_wait", lambda step, is_warmup: None)
    with pytest.raises(DeviceError, match="the GPU failed: as wanted"):
        runner.allocate_kv(NUM_BLOCKS)
    monkeypatch.undo()
    runner.close()


@pytest.mark.parametrize("is_eager", [False, True])
def test_a_shape_that_is_recorded_is_not_run_for_its_own_sake(
    engine: Engine, is_eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 slots, 32 tokens at most and blocks enough all shapes are small enough to record."""
    runner = engine.runner
    assert isinstance(runner, CudaRunner)
    runner._is_eager = is_eager
    run, recorded = list[int](), list[int]()

    def note(step: Step, *, is_warmup: bool) -> None:
        assert is_warmup, "the whole of a large model takes a second for all shapes"
        run.append(step.num_tokens)

    monkeypatch.setattr(runner, "_run_and_wait", note)
    monkeypatch.setattr(runner, "_record", lambda step: recorded.append(step.num_tokens))
    runner.allocate_kv(NUM_BLOCKS)
    assert run == ([32, 16, 8, 4, 2, 1] if is_eager else [])
    assert sorted(set(recorded)) == ([] if is_eager else [1, 2, 4, 8, 16, 32])
    recorded.clear()
    runner.allocate_kv(2)  # too few blocks for the large ones
    assert set(run) | set(recorded) == {1, 2, 4, 8, 16, 32}
    assert not set(run[6 * is_eager :]) & set(recorded)
    runner.close()


def test_a_step_that_nobody_waits_for_any_more_may_still_end(engine: Engine) -> None:
    runner = engine.runner
    problems: list[object] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: problems.append(context))
        runner.attach(loop)
        engine.add(SequenceRequest([1] * 10, SamplingParams(max_tokens=2, temperature=0.0)))
        step = engine.schedule()
        assert step is not None
        result = runner.launch(step).sample()
        result.cancel()
        await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(run(), 60))
    assert problems == []
    runner.close()


def test_every_call_after_the_end_has_an_answer(engine: Engine) -> None:
    async def run() -> None:
        client = start(engine)
        stream = client.submit(
            SequenceRequest([1] * 10, SamplingParams(max_tokens=200, temperature=0.0))
        )
        await stream.read()
        assert client.stats().num_device_allocations == 5
        await stop_and_check(client, engine, stream)

    asyncio.run(asyncio.wait_for(run(), 60))
