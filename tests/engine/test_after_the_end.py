"""The engine's calls after its end, on the fake runner; test_runner.py and test_cuda_runner.py hold
the real ones to the same."""

from __future__ import annotations

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine.batch import Step
from pyserve.errors import DeviceError, UnavailableError
from pyserve.params import SamplingParams
from tests.engine.after_the_end import stop_and_check
from tests.engine.fake_runner import make_engine
from tests.engine.test_async_engine import async_engine, fake, run


@pytest.mark.parametrize("depth", [0, 1])
def test_every_call_after_the_end_has_an_answer(depth: int) -> None:
    async def test() -> None:
        engine = make_engine()
        fake(engine).num_device_allocations = 7
        client = async_engine(engine, depth)
        client.start()
        stream = client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=100, seed=0)))
        await stream.read()
        await stop_and_check(client, engine, stream)

    run(test())


def test_every_call_after_giving_up_has_an_answer() -> None:
    async def test() -> None:
        engine = make_engine()
        client = async_engine(engine)
        client.start()
        stream = client.submit(SequenceRequest([1] * 10, SamplingParams(max_tokens=100, seed=0)))
        await stream.read()

        def lose(step: Step) -> None:
            raise DeviceError("the GPU failed: CUDA_ERROR_X")

        fake(engine).on_step = lose
        for _ in range(2):
            assert await client.wait_stopped() == "the GPU failed: CUDA_ERROR_X"
            stats = client.stats()
            assert stats.error == "the GPU failed: CUDA_ERROR_X"
            assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0
            assert stats.step_age_s == 0.0
            with pytest.raises(UnavailableError, match="CUDA_ERROR_X"):
                client.submit(SequenceRequest([1], SamplingParams(max_tokens=1)))
            with pytest.raises(UnavailableError, match="CUDA_ERROR_X"):
                client.check_room(1)
            with pytest.raises(RuntimeError, match="started once"):
                client.start()
            client.abort(stream)
            await client.stop()

    run(test())


def test_an_engine_is_started_once() -> None:
    async def test() -> None:
        client = async_engine(make_engine())
        client.start()
        with pytest.raises(RuntimeError, match="started once"):
            client.start()
        await client.stop()

    run(test())
