"""Recorded steps on a card: what is recorded, and that a replay computes what its launches do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

import pytest
import torch

from pyserve.engine.batch import StepShape, padded_sizes
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.executor import StepExecutor
from pyserve.engine.graphs import MAX_GRAPH_TOKENS, GraphCache
from pyserve.engine.state import StepLimits
from pyserve.errors import DeviceError
from pyserve.model.decoder import Decoder
from tests.gpu.test_run_ahead import NUM_SLOTS, decoder, engine_for, generate

pytestmark = pytest.mark.gpu

__all__ = ["decoder"]  # a fixture


def executor_for(decoder: Decoder, *, max_num_batched_tokens: int = 1024) -> StepExecutor:
    return StepExecutor(
        decoder,
        StepLimits(
            block_size=16,
            num_slots=NUM_SLOTS,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=256,
            logits_tile_rows=3,
        ),
    )


@pytest.mark.parametrize("max_num_batched_tokens", [1, 19, 300, 1024])
def test_every_small_step_is_recorded(decoder: Decoder, max_num_batched_tokens: int) -> None:
    executor = executor_for(decoder, max_num_batched_tokens=max_num_batched_tokens)
    runner = CudaRunner(executor)
    runner.allocate_kv(40)
    decode_query_len = decoder.decode_query_len
    for num_tokens in padded_sizes(max_num_batched_tokens):
        for max_query_len in (1, decode_query_len + 1):
            # As many rows as such a step has at least; a decoding one also has at most so many.
            num_rows = -(-num_tokens // max_query_len)
            if num_rows <= NUM_SLOTS and max_query_len <= num_tokens:
                shape = StepShape(num_tokens, num_rows, num_rows, max_query_len)
                assert executor.has_graph(shape) is (num_tokens <= MAX_GRAPH_TOKENS), shape
    runner.close()


def test_replays_are_what_the_launches_are(decoder: Decoder) -> None:
    outputs = {
        (is_eager, depth): asyncio.run(
            asyncio.wait_for(generate(engine_for(decoder, depth, is_eager=is_eager)), 30)
        )
        for is_eager in (True, False)
        for depth in (0, 1)
    }
    expected = outputs[True, 0]
    assert all(len(output) == 60 and len(set(output)) > 10 for output in expected)
    assert all(output == expected for output in outputs.values())


def test_without_graphs_nothing_is_recorded(decoder: Decoder) -> None:
    executor = executor_for(decoder)
    runner = CudaRunner(executor, is_eager=True)
    runner.allocate_kv(40)
    assert not executor.has_graph(StepShape(1, 1, 1, 1))
    runner.close()


@pytest.mark.parametrize("part", [tuple, int])
def test_a_record_that_computes_something_else_is_not_served(
    decoder: Decoder, part: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = GraphCache.record

    def record_nothing(self: GraphCache, key: Hashable, launch: Callable[[], object]) -> None:
        record(self, key, (lambda: None) if isinstance(key, part) else launch)

    monkeypatch.setattr(GraphCache, "record", record_nothing)
    runner = CudaRunner(executor_for(decoder))
    with pytest.raises(DeviceError, match="computes something else than .*--enforce-eager"):
        runner.allocate_kv(40)
    torch.cuda.synchronize()
