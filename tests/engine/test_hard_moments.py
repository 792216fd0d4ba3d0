"""The moments of hard_moments.py on a real model in float32 on a CPU: also the same tokens, whether
a step is awaited or the next one is launched behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from pyserve.client import EngineInfo
from pyserve.engine.async_engine import AsyncEngine
from pyserve.model.decoder import Decoder
from tests.engine import hard_moments
from tests.engine.hard_moments import Output
from tests.engine.test_runner import BLOCK_SIZE, MAX_MODEL_LEN, decoder, make_engine, threads
from tests.engine.tiny import VOCAB_SIZE

__all__ = ["decoder", "threads"]  # fixtures

Moment = Callable[[AsyncEngine], Awaitable[list[Output]]]
AMPLE = 128  # blocks
SHORT = 36  # fewer than eight sequences of 120 tokens come to
FULL = 25  # what two sequences come to, and the one that is kept back for growing
MOMENTS: dict[str, tuple[Moment, int]] = {
    "at_the_context_limit": (hard_moments.at_the_context_limit, AMPLE),
    "all_end_at_once": (hard_moments.all_end_at_once, AMPLE),
    "aborted_between_the_launches": (
        partial(hard_moments.aborted_between_the_launches, vocab_size=VOCAB_SIZE), AMPLE
    ),
    "preempted_in_flight": (hard_moments.preempted_in_flight, SHORT),
    "memory_full_with_500_waiting": (hard_moments.memory_full_with_500_waiting, FULL),
}  # fmt: skip


def client_for(decoder: Decoder, num_blocks: int, depth: int) -> AsyncEngine:
    engine = make_engine(decoder, num_blocks=num_blocks)
    engine.runner.run_ahead_depth = depth
    info = EngineInfo(
        max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=8, block_size=BLOCK_SIZE,
        num_blocks=num_blocks, dtype="float32", device="cpu",
    )  # fmt: skip
    return AsyncEngine(engine, info)


async def outputs_of(moment: Moment, decoder: Decoder, num_blocks: int, depth: int) -> list[Output]:
    client = client_for(decoder, num_blocks, depth)
    client.start()
    outputs = await moment(client)
    await client.stop()
    return outputs


@pytest.mark.parametrize("name", MOMENTS)
def test_whole_and_the_same_at_every_depth(decoder: Decoder, name: str) -> None:
    moment, num_blocks = MOMENTS[name]
    awaited, ahead = (
        asyncio.run(asyncio.wait_for(outputs_of(moment, decoder, num_blocks, depth), 40))
        for depth in (0, 1)
    )
    assert awaited == ahead


def test_preempted_sequences_say_what_they_would_have_said(decoder: Decoder) -> None:
    async def test() -> None:
        short = await outputs_of(hard_moments.preempted_in_flight, decoder, SHORT, 1)
        client = client_for(decoder, AMPLE, 0)
        client.start()
        assert await hard_moments.eight_long(client) == short
        assert client.stats().num_preemptions == 0
        await client.stop()

    asyncio.run(asyncio.wait_for(test(), 40))
