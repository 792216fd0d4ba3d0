"""Moments at which the engine's books are easily wrong, whatever executes its steps.

Each is a request load and what must be so at its end: every sequence whole, nothing held.
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from pyserve.client import SequenceRequest, SequenceStream
from pyserve.engine.async_engine import AsyncEngine
from pyserve.errors import InvalidRequestError
from pyserve.params import SamplingParams
from tests.engine.constraints import Scripted, windows
from tests.waiting import until

Output = tuple[list[int], str]
NUM_QUEUED = 500
NUM_SLOTS = 8  # as many as both runners under test have


async def read_all(stream: SequenceStream) -> Output:
    token_ids: list[int] = []
    while True:
        delta = await stream.read()
        token_ids += delta.token_ids
        if delta.finish_reason is not None:
            return token_ids, delta.finish_reason


def submit(client: AsyncEngine, prompt: list[int], max_tokens: int, seed: int) -> SequenceStream:
    temperature = 0.0 if seed % 2 else 1.0
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    return client.submit(SequenceRequest(prompt, params))


def check_idle(client: AsyncEngine) -> None:
    stats = client.stats()
    assert stats.num_running == stats.num_waiting == stats.num_blocks_used == 0
    assert stats.error is None and stats.num_nan_sequences == 0


async def at_the_context_limit(client: AsyncEngine) -> list[Output]:
    """The last position, and the last block, of the block table are used and no more."""
    limit, block = client.info.max_model_len, client.info.block_size
    lengths = (limit - 1, limit - 2, limit - block, limit - block + 1, limit - block - 1, 1)
    streams = [
        submit(client, [7 + seed] * length, limit - length, seed)
        for seed, length in enumerate(lengths)
    ]
    for length, max_tokens in ((limit, 1), (limit - 1, 2)):
        with pytest.raises(InvalidRequestError, match=f"{limit + 1}, the limit is {limit} tokens"):
            submit(client, [7] * length, max_tokens, 0)
    outputs = await asyncio.gather(*map(read_all, streams))
    ends = [(len(token_ids), reason) for token_ids, reason in outputs]
    assert ends == [(limit - length, "length") for length in lengths]
    check_idle(client)
    return outputs


async def all_end_at_once(client: AsyncEngine) -> list[Output]:
    """Every row of a step is its sequence's last; others wait for all those slots."""
    streams = [submit(client, [5, number, 3], 20, number % 8) for number in range(3 * NUM_SLOTS)]
    outputs = await asyncio.gather(*map(read_all, streams))
    assert all(len(token_ids) == 20 and reason == "length" for token_ids, reason in outputs)
    check_idle(client)
    return outputs


async def aborted_between_the_launches(client: AsyncEngine, vocab_size: int) -> list[Output]:
    """A constrained sequence leaves when its step's forward pass is launched, its draw is not."""
    begun, opened = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert opened.wait(10)

    rule = windows(vocab_size, 9)
    prompt, params = [3, 1, 4, 1, 5], SamplingParams(max_tokens=12, temperature=0.0)
    held, mate = Scripted(rule, on_fill=hold), Scripted(rule)
    leaving = client.submit(SequenceRequest(prompt, params, constraint=held))
    staying = [
        client.submit(SequenceRequest(prompt, params, constraint=mate)),
        client.submit(SequenceRequest([9, 2, 6], params)),
    ]
    await until(begun.is_set)
    client.abort(leaving)
    follower = submit(client, [2, 7, 1, 8], 12, 1)  # takes the slot that has become free
    assert await read_all(leaving) == ([], "abort")
    opened.set()
    outputs = await asyncio.gather(*map(read_all, [*staying, follower]))
    assert all(len(token_ids) == 12 and reason == "length" for token_ids, reason in outputs)
    assert held.history == [] and mate.history == outputs[0][0]
    check_idle(client)
    return outputs


async def eight_long(client: AsyncEngine) -> list[Output]:
    streams = [submit(client, [number] * 20, 100, number) for number in range(NUM_SLOTS)]
    outputs = await asyncio.gather(*map(read_all, streams))
    assert all(len(token_ids) == 100 and reason == "length" for token_ids, reason in outputs)
    return outputs


async def preempted_in_flight(client: AsyncEngine) -> list[Output]:
    """Memory runs out while steps are in flight: what they draw for those who lose it is dropped.

    `client` has fewer blocks than its sequences come to.
    """
    outputs = await eight_long(client)
    assert client.stats().num_preemptions > 0
    check_idle(client)
    return outputs


async def memory_full_with_500_waiting(client: AsyncEngine) -> list[Output]:
    """Two sequences hold the memory; those behind them come in as it becomes free, in turn."""
    ended: list[int] = []

    async def read(number: int, stream: SequenceStream) -> Output:
        output = await read_all(stream)
        ended.append(number)
        return output

    info = client.info
    per_sequence = info.num_blocks // 2 * info.block_size
    first = [submit(client, [number] * (per_sequence - 8), 8, number) for number in range(2)]
    for stream in first:
        await stream.read()
    assert client.stats().num_blocks_used >= info.num_blocks - 1
    behind = [submit(client, [number % 50] * 9, 3, number % 8) for number in range(NUM_QUEUED)]
    outputs, rest = asyncio.gather(*map(read, range(NUM_QUEUED), behind)), map(read_all, first)
    assert client.stats().num_waiting == NUM_QUEUED
    assert all(reason == "length" for _, reason in await asyncio.gather(*rest))
    results = await outputs
    assert all(len(token_ids) == 3 and reason == "length" for token_ids, reason in results)
    # Nobody was passed by more than those who ran beside it.
    assert all(abs(number - place) < 4 * NUM_SLOTS for place, number in enumerate(ended))
    check_idle(client)
    return results
