"""What must be so after the end of an engine, whatever executes its steps."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pyserve.client import EngineClient, SequenceRequest, SequenceStream
from pyserve.engine.engine import Engine
from pyserve.errors import UnavailableError
from pyserve.metrics import Metrics
from pyserve.params import SamplingParams


async def stop_and_check(client: EngineClient, engine: Engine, stream: SequenceStream) -> None:
    """Stop `client`, made of `engine`, while `stream` runs; then call all that may be called."""
    metrics = Metrics("m")
    metrics.watch(client.stats, client.info)
    info, before = client.info, client.stats()
    assert before.num_running == 1 and before.num_blocks_used > 0
    gave_up = asyncio.ensure_future(client.wait_stopped())
    await asyncio.wait_for(asyncio.gather(client.stop(), client.stop()), 20)
    for _ in range(2):
        after = client.stats()
        assert replace(after, num_steps=0, output_tokens=0) == replace(
            before, num_steps=0, output_tokens=0, num_running=0, num_blocks_used=0, step_age_s=0.0
        )
        assert after.num_steps >= before.num_steps
        assert b"vllm:num_requests_running{" in metrics.render()
        assert client.info == info
        with pytest.raises(UnavailableError, match="shutting down"):
            client.submit(SequenceRequest([1, 2], SamplingParams(max_tokens=1)))
        with pytest.raises(UnavailableError, match="shutting down"):
            client.check_room(1)
        with pytest.raises(UnavailableError, match="shutting down"):
            while True:  # after what it had delivered
                await asyncio.wait_for(stream.read(), 5)
        client.abort(stream)
        client.reset_prefix_cache()
        with pytest.raises(RuntimeError, match="started once"):
            client.start()
        await asyncio.wait_for(client.stop(), 5)
    await asyncio.sleep(0)
    assert not gave_up.done(), "a clean end is not a failure"
    gave_up.cancel()
    check_closed(engine)


def check_closed(engine: Engine) -> None:
    """Of the runner below: what it still tells, and what it refuses."""
    runner = engine.runner
    runner.close()
    assert runner.num_device_allocations >= 0
    assert runner.run_ahead_depth >= 0 and (runner.step_deadline_s or 1.0) > 0
    assert engine.schedule() is None
    assert not engine.step()
    with pytest.raises(RuntimeError, match="closed"):
        runner.attach(asyncio.get_running_loop())
    engine.add(SequenceRequest([1, 2], SamplingParams(max_tokens=1)))
    with pytest.raises(RuntimeError, match="closed"):
        engine.step()
