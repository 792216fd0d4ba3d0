"""The moments of tests/engine/hard_moments.py on a card: steps replayed or launched op by op, each
awaited or the next one launched behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from pyserve.engine.async_engine import AsyncEngine
from pyserve.model.decoder import Decoder
from tests.engine import hard_moments
from tests.engine.hard_moments import Output
from tests.engine.tiny import VOCAB_SIZE
from tests.gpu.test_run_ahead import decoder, engine_for

pytestmark = pytest.mark.gpu

__all__ = ["decoder"]  # a fixture

Moment = Callable[[AsyncEngine], Awaitable[list[Output]]]
MOMENTS: dict[str, tuple[Moment, int]] = {  # and blocks, as in tests/engine/test_hard_moments.py
    "at_the_context_limit": (hard_moments.at_the_context_limit, 128),
    "all_end_at_once": (hard_moments.all_end_at_once, 128),
    "aborted_between_the_launches": (
        partial(hard_moments.aborted_between_the_launches, vocab_size=VOCAB_SIZE), 128
    ),
    "preempted_in_flight": (hard_moments.preempted_in_flight, 36),
    "memory_full_with_500_waiting": (hard_moments.memory_full_with_500_waiting, 25),
}  # fmt: skip


@pytest.mark.parametrize("is_eager", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", MOMENTS)
def test_every_sequence_is_whole(decoder: Decoder, name: str, depth: int, is_eager: bool) -> None:
    async def test() -> None:
        moment, num_blocks = MOMENTS[name]
        client = engine_for(decoder, depth, is_eager=is_eager, num_blocks=num_blocks)
        client.start()
        num_allocations = client.stats().num_device_allocations
        await moment(client)
        assert client.stats().num_device_allocations == num_allocations
        await client.stop()

    asyncio.run(asyncio.wait_for(test(), 60))
