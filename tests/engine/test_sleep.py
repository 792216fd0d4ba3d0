"""An engine that sleeps: memory falls, nothing is lost, and the answers are those of one awake."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

from pyserve.client import SequenceRequest, SequenceStream
from pyserve.engine import load
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.load import build_engine
from pyserve.errors import CheckpointError, UnavailableError
from pyserve.params import SamplingParams
from tests.engine.tiny import engine_config, write_model
from tests.waiting import until

WAIT_S = 30
PROMPT = [5, 6, 7, 8] * 10
MB = 2**20
KV_BYTES = 64 * MB
# 2 x 48 MB of embedding and head, in float32.
LARGE = {"vocab_size": 24_000, "hidden_size": 512, "intermediate_size": 64}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def submit(engine: AsyncEngine, max_tokens: int = 40) -> SequenceStream:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return engine.submit(SequenceRequest(PROMPT, params))


async def tokens_of(stream: SequenceStream) -> list[int]:
    token_ids: list[int] = []
    while True:
        delta = await asyncio.wait_for(stream.read(), WAIT_S)
        token_ids += delta.token_ids
        if delta.finish_reason is not None:
            assert delta.finish_reason == "length"
            return token_ids


@pytest.fixture
def large(tmp_path: Path) -> AsyncEngine:
    gc.collect()
    folder = write_model(tmp_path / "m", **LARGE)
    config = engine_config(folder, kv_cache_memory_bytes=KV_BYTES, max_num_batched_tokens=16)
    return build_engine(config, progress=lambda *_: None)


def test_memory_falls_and_what_ran_and_waited_goes_on(large: AsyncEngine) -> None:
    async def run() -> None:
        large.start()
        expected = await tokens_of(submit(large))
        awake = resident_bytes()
        for level, freed in ((1, KV_BYTES), (2, KV_BYTES + 96 * MB)):
            running = submit(large)
            first = await asyncio.wait_for(running.read(), WAIT_S)
            await asyncio.wait_for(large.sleep(level), WAIT_S)
            stats = large.stats()
            assert (stats.sleep_level, stats.num_running, stats.num_waiting) == (level, 0, 1)
            assert stats.num_blocks_used == 0
            assert awake - resident_bytes() > 0.8 * freed
            waiting, aborted = submit(large), submit(large)
            large.abort(aborted)
            assert large.stats().num_waiting == 2
            await asyncio.wait_for(large.wake_up(), WAIT_S)
            assert large.stats().sleep_level == 0
            assert first.token_ids + await tokens_of(running) == expected
            assert await tokens_of(waiting) == expected
            large._engine.check_invariants()
        await asyncio.wait_for(large.stop(), WAIT_S)

    asyncio.run(run())


def test_it_moves_between_levels_and_ends_asleep(tmp_path: Path) -> None:
    async def run() -> None:
        engine = build_engine(engine_config(write_model(tmp_path / "m")), progress=lambda *_: None)
        engine.start()
        await engine.wake_up()
        for level, reached in ((1, 1), (2, 2), (1, 2)):
            await asyncio.wait_for(engine.sleep(level), WAIT_S)
            assert engine.stats().sleep_level == reached
        stream = submit(engine)
        moving = [asyncio.ensure_future(engine.wake_up()), asyncio.ensure_future(engine.sleep(2))]
        await asyncio.wait_for(asyncio.gather(*moving), WAIT_S)
        assert engine.stats().sleep_level == 2
        await asyncio.wait_for(engine.stop(), WAIT_S)
        with pytest.raises(UnavailableError, match="shutting down"):
            await stream.read()
        for call in (engine.sleep(1), engine.wake_up()):
            with pytest.raises(UnavailableError, match="shutting down"):
                await call

    asyncio.run(run())


def test_idle_it_falls_asleep_and_a_request_wakes_it(tmp_path: Path) -> None:
    async def run() -> None:
        config = engine_config(write_model(tmp_path / "m"), idle_sleep_min=0.001)
        engine = build_engine(config, progress=lambda *_: None)
        engine.start()
        texts = []
        for _ in range(2):
            texts.append(await tokens_of(submit(engine)))
            await until(lambda: engine.stats().sleep_level == 2)
        assert texts[0] == texts[1]
        await asyncio.wait_for(engine.sleep(1), WAIT_S)  # asked for now: a request must not wake it
        stream = submit(engine)
        await asyncio.sleep(0.1)
        assert engine.stats().sleep_level == 2 and not stream.is_finished
        await asyncio.wait_for(engine.wake_up(), WAIT_S)
        assert await tokens_of(stream) == texts[0]
        await asyncio.wait_for(engine.stop(), WAIT_S)

    asyncio.run(run())


def test_weights_that_are_not_there_any_more_leave_it_asleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        engine = build_engine(engine_config(write_model(tmp_path / "m")), progress=lambda *_: None)
        engine.start()
        expected = await tokens_of(submit(engine))
        await asyncio.wait_for(engine.sleep(2), WAIT_S)
        stream = submit(engine)
        with monkeypatch.context() as patch:
            patch.setattr(load, "load_model", not_there)
            with pytest.raises(UnavailableError, match="cannot wake up: model.safetensors is miss"):
                await asyncio.wait_for(engine.wake_up(), WAIT_S)
        assert engine.stats().sleep_level == 2 and engine.stats().error is None
        await asyncio.wait_for(engine.wake_up(), WAIT_S)
        assert await tokens_of(stream) == expected
        await asyncio.wait_for(engine.stop(), WAIT_S)

    def not_there(*args: object, **kwargs: object) -> None:
        raise CheckpointError("model.safetensors is missing")

    asyncio.run(run())
