"""Constrained sequences on a card: what is allowed, the same at every depth, mates undisturbed."""

from __future__ import annotations

import asyncio

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.model.decoder import Decoder
from pyserve.params import SamplingParams
from tests.engine.constraints import Rule, Scripted, windows
from tests.engine.tiny import VOCAB_SIZE
from tests.gpu.test_run_ahead import NUM_SLOTS, decoder, engine_for, read_all

pytestmark = pytest.mark.gpu

__all__ = ["decoder"]  # a fixture

RULES: list[Rule | None] = [
    None if number % 3 == 0 else windows(VOCAB_SIZE, 1 + 4 * number) for number in range(NUM_SLOTS)
]


async def generate(engine: AsyncEngine, rules: list[Rule | None]) -> list[list[int]]:
    """Equal numbers of tokens, so that every step has the same rows at every depth."""
    engine.start()
    num_allocations = engine.stats().num_device_allocations
    constraints = [None if rule is None else Scripted(rule) for rule in rules]
    streams = [
        engine.submit(
            SequenceRequest(
                [3, 1, 4, number] * 4,
                SamplingParams(max_tokens=60, temperature=0.0 if number % 2 else 1.0, seed=number),
                constraint=constraint,
            )
        )
        for number, constraint in enumerate(constraints)
    ]
    outputs = await asyncio.gather(*map(read_all, streams))
    for constraint, output in zip(constraints, outputs, strict=True):
        assert constraint is None or constraint.history == output  # each was allowed, as it asserts
    assert engine.stats().num_blocks_used == 0
    assert engine.stats().num_device_allocations == num_allocations
    await engine.stop()
    return outputs


@pytest.mark.parametrize("is_eager", [False, True])
def test_depths_give_the_same_allowed_tokens(decoder: Decoder, is_eager: bool) -> None:
    expected: list[list[int]] | None = None
    for depth in (0, 1, 2):
        engine = engine_for(decoder, depth, is_eager=is_eager)
        outputs = asyncio.run(asyncio.wait_for(generate(engine, RULES), 60))
        expected = expected or outputs
        assert outputs == expected, depth
        assert all(len(output) == 60 for output in outputs)


def test_a_mask_that_allows_all_changes_nothing(decoder: Decoder) -> None:
    """Also not by running sampling op by op where it would be replayed."""
    everything = range(VOCAB_SIZE)
    masked, plain = (
        asyncio.run(asyncio.wait_for(generate(engine_for(decoder, 1), [rule] * NUM_SLOTS), 60))
        for rule in (lambda output: everything, None)
    )
    assert masked == plain


def test_only_a_masked_sampling_is_launched_op_by_op(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(decoder, 1)
    runner = engine._engine.runner
    assert isinstance(runner, CudaRunner)
    executor = runner._executor
    calls: list[str] = []

    def record(name: str) -> None:
        call = getattr(executor, name)

        def recorded(*args: object, **kwargs: object) -> None:
            calls.append(name)
            call(*args, **kwargs)

        monkeypatch.setattr(executor, name, recorded)

    record("_forward")
    record("_sample")
    # Every fifth token is free: its step is replayed whole.
    asyncio.run(asyncio.wait_for(generate(engine, [windows(VOCAB_SIZE, 9)] * NUM_SLOTS), 60))
    assert calls == ["_sample"] * 48
