"""An engine on a card that sleeps: its memory is given back, and it answers as before.

It wants the card for itself: what others hold shows as what was not given back.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.client import SequenceRequest, SequenceStream, TokenLogprobs
from pyserve.config import DEMO_MODEL, EngineConfig
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.load import build_engine
from pyserve.errors import UnavailableError
from pyserve.params import SamplingParams
from tests.gpu.test_memory import LLAMA, build, used_bytes
from tests.waiting import until

CARD = torch.device("cuda", 0)
GIB, MIB = 2**30, 2**20
KV_BYTES = 4 * GIB
ASLEEP_BYTES = GIB  # at most, the CUDA context and loaded code
STEADY_BYTES = 16 * MIB  # by which what the card shows may vary
WAKE_S = 4.0  # an 8B model, until it has answered
WAIT_S = 30
PROMPTS = [[5, 6, 7, 8] * 10, list(range(300)), [9]]

Answer = tuple[list[int], list[float]]  # tokens, and their logprobs, of which every bit counts


@pytest.fixture(autouse=True)
def empty_card() -> Iterator[None]:
    yield
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of the streams of an engine that has ended
    torch.cuda.empty_cache()


def demo(**settings: object) -> AsyncEngine:
    settings = {"kv_cache_memory_bytes": KV_BYTES, "max_num_seqs": 32} | settings
    config = EngineConfig(model_path=DEMO_MODEL, device="cuda", **settings)  # type: ignore[arg-type]
    return build_engine(config, progress=lambda *report: None)


def submit(engine: AsyncEngine, prompt: list[int], max_tokens: int = 40) -> SequenceStream:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, num_logprobs=1)
    return engine.submit(SequenceRequest(prompt, params))


async def answer_of(stream: SequenceStream) -> Answer:
    token_ids: list[int] = []
    told: list[TokenLogprobs] = []
    while True:
        delta = await asyncio.wait_for(stream.read(), WAIT_S)
        token_ids += delta.token_ids
        told += delta.logprobs or []
        if delta.finish_reason is not None:
            return token_ids, [entry.logprob for entry in told]


async def answers(engine: AsyncEngine) -> list[Answer]:
    """One after the other, so that their steps are the same each time."""
    engine.reset_prefix_cache()
    return [await answer_of(submit(engine, prompt)) for prompt in PROMPTS]


def run(what: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(what, 50))


def test_ten_times_it_gives_its_memory_back_and_answers_the_same() -> None:
    async def sleep_and_wake() -> None:
        engine = demo()
        engine.start()
        expected = await answers(engine)
        awake, asleep = [used_bytes()], list[int]()
        for cycle in range(10):
            await asyncio.wait_for(engine.sleep(1 + cycle % 2), WAIT_S)
            assert engine.stats().sleep_level == 1 + cycle % 2
            asleep.append(used_bytes())
            waiting = submit(engine, PROMPTS[0])
            await asyncio.wait_for(engine.wake_up(), WAIT_S)
            num_allocations = engine.stats().num_device_allocations
            assert await answer_of(waiting) == expected[0]
            assert await answers(engine) == expected
            many = [submit(engine, [7 + index] * 200) for index in range(32)]
            for stream in many:
                await answer_of(stream)
            assert engine.stats().num_device_allocations == num_allocations
            awake.append(used_bytes())
        print(f"MiB awake {[it // MIB for it in awake]}, asleep {[it // MIB for it in asleep]}")
        assert max(asleep) <= ASLEEP_BYTES
        for used in (awake[2:], asleep[2:]):  # cuBLAS has room for both threads by then
            assert max(used) - min(used) <= STEADY_BYTES
        await engine.stop()

    run(sleep_and_wake())


def test_what_runs_goes_on_and_idle_it_sleeps_by_itself() -> None:
    async def sleep_and_wake() -> None:
        engine = demo(idle_sleep_min=0.01)
        engine.start()
        (expected, _) = await answer_of(submit(engine, PROMPTS[0], max_tokens=800))
        running = submit(engine, PROMPTS[0], max_tokens=800)
        first = await asyncio.wait_for(running.read(), WAIT_S)
        await asyncio.wait_for(engine.sleep(2), WAIT_S)
        assert engine.stats().num_waiting == 1 and used_bytes() <= ASLEEP_BYTES
        await asyncio.wait_for(engine.wake_up(), WAIT_S)
        # Its keys are computed anew by steps of other shapes: only its length is sure.
        token_ids, _ = await answer_of(running)
        assert len(first.token_ids) + len(token_ids) == len(expected)
        for _ in range(2):
            await until(lambda: engine.stats().sleep_level == 2)
            assert used_bytes() <= ASLEEP_BYTES
            assert (await answer_of(submit(engine, PROMPTS[0], max_tokens=800)))[0] == expected
        await engine.stop()

    run(sleep_and_wake())


def test_where_others_have_taken_the_memory_it_sleeps_on() -> None:
    async def sleep_and_wake() -> None:
        engine = demo()
        engine.start()
        expected = await answers(engine)
        await asyncio.wait_for(engine.sleep(1), WAIT_S)
        free, _ = torch.cuda.mem_get_info(CARD)
        taken = torch.empty(free - KV_BYTES // 2, dtype=torch.uint8, device=CARD)
        waiting = submit(engine, PROMPTS[0])
        with pytest.raises(UnavailableError, match="other processes have taken it"):
            await asyncio.wait_for(engine.wake_up(), WAIT_S)
        assert engine.stats().sleep_level == 2 and engine.stats().error is None
        assert used_bytes() - taken.nbytes <= ASLEEP_BYTES
        del taken
        torch.cuda.empty_cache()
        await asyncio.wait_for(engine.wake_up(), WAIT_S)
        assert await answer_of(waiting) == expected[0]
        await engine.stop()

    run(sleep_and_wake())


def test_an_8b_model_is_awake_within_seconds(tmp_path: Path) -> None:
    """Its weights are made up, which takes a card no time; bench.sleep_wake reads them."""
    if torch.cuda.get_device_properties(CARD).total_memory < 24e9:
        pytest.skip("needs a card of 24 GB")
    engine = build(tmp_path, LLAMA)

    async def sleep_and_wake() -> None:
        engine.start()
        expected = await answer_of(submit(engine, PROMPTS[0]))
        await asyncio.wait_for(engine.sleep(2), WAIT_S)
        assert used_bytes() <= ASLEEP_BYTES
        waiting, began_s = submit(engine, PROMPTS[0], max_tokens=40), time.monotonic()
        await asyncio.wait_for(engine.wake_up(), WAIT_S)
        assert await answer_of(waiting) == expected
        took_s = time.monotonic() - began_s
        print(f"awake and 40 tokens after {took_s:.2f} s")
        assert took_s <= WAKE_S
        await engine.stop()

    run(sleep_and_wake())
