"""Steps that no request asked for: each is one that the limits allow."""

from __future__ import annotations

import pytest

from pyserve.engine.batch import padded_sizes
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.graphs import MAX_GRAPH_TOKENS, graph_sizes
from pyserve.engine.state import StepLimits
from pyserve.engine.warmup import graph_steps, largest_step, warmup_steps

VOCAB_SIZE = 97


@pytest.mark.parametrize(
    ("num_slots", "max_model_len"), [(1, 256), (3, 1), (4, 16), (6, 100), (250, 4096), (1024, 300)]
)
def test_a_step_has_the_rows_and_the_lengths_that_may_come(
    num_slots: int, max_model_len: int
) -> None:
    limits = StepLimits(
        num_slots=num_slots, max_num_batched_tokens=8192, max_model_len=max_model_len,
        block_size=16, logits_tile_rows=num_slots,
    )  # fmt: skip
    recorded = list(graph_steps(limits, num_blocks=2**19, vocab_size=VOCAB_SIZE))
    for step in [largest_step(limits), *warmup_steps(limits), *recorded]:
        assert 1 <= len(step.row_slots) == len(set(step.row_slots)) <= num_slots
        assert max(step.row_slots) < num_slots
        assert 1 <= min(step.query_lens) and max(step.query_lens) <= max_model_len
        assert step.num_tokens == sum(step.query_lens) <= 8192
    assert max(step.num_tokens for step in recorded) == min(
        MAX_GRAPH_TOKENS, num_slots * max_model_len
    )


def test_shapes_of_many_tokens_are_run_a_few_apart() -> None:
    """All that are recorded, the largest that comes, and none far from one that is run."""
    limits = StepLimits(
        num_slots=256, max_num_batched_tokens=8000, max_model_len=8192, block_size=16,
        logits_tile_rows=256,
    )  # fmt: skip
    warm = [step.num_tokens for step in warmup_steps(limits)]
    assert warm == sorted(warm, reverse=True) and warm[0] == 8000
    assert set(graph_sizes(8000)) <= set(warm)
    assert all(min(abs(size - other) for other in warm) <= 256 for size in padded_sizes(8000))
    assert len(warm) < len(padded_sizes(8000)) / 1.5


def test_slots_for_adapters_have_steps_of_their_own() -> None:
    """Each once with tokens that use them, all slots alike, and once without."""
    limits = StepLimits(
        num_slots=8, max_num_batched_tokens=512, max_model_len=256, block_size=16,
        logits_tile_rows=8,
    )  # fmt: skip
    plain = list(graph_steps(limits, num_blocks=512, vocab_size=VOCAB_SIZE))
    both = list(graph_steps(limits, num_blocks=512, vocab_size=VOCAB_SIZE, num_adapter_slots=3))
    assert [step.shape for step in both[::2]] == [step.shape for step in plain]
    assert [step.shape._replace(has_adapters=False) for step in both[1::2]] == [
        step.shape for step in plain
    ]
    assert all(step.shape.has_adapters for step in both[1::2])
    for step in both[1::2]:
        assert len(step.adapter_starts) == 4 and step.adapter_starts[0] == 0
        assert step.adapter_starts == sorted(step.adapter_starts)
        assert step.adapter_starts[-1] == step.num_tokens
    shapes = {(it.num_tokens, it.shape.has_adapters) for it in both}
    warm = {
        (it.num_tokens, it.shape.has_adapters) for it in warmup_steps(limits, num_adapter_slots=3)
    }
    assert shapes <= warm and len(warm) == 2 * len(list(warmup_steps(limits)))


def test_a_recorded_step_uses_no_block_that_is_not_there() -> None:
    limits = StepLimits(
        num_slots=8, max_num_batched_tokens=512, max_model_len=256, block_size=16,
        logits_tile_rows=8,
    )  # fmt: skip
    steps = list(graph_steps(limits, num_blocks=20, vocab_size=VOCAB_SIZE))
    assert steps
    for step in steps:
        block_ids = step.block_updates[2::3]
        assert len(block_ids) == sum(num_blocks_for(n, 16) for n in step.query_lens)
        assert sorted(block_ids) == list(range(len(block_ids))) and len(block_ids) <= 20
        assert all(
            token_ids is not None and max(token_ids) < VOCAB_SIZE for token_ids in step.host_tokens
        )
