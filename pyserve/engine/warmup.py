"""Warm-up steps: artificial steps that make a device ready for the shapes that can come.

They start from reset slots, and no request reads what they write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pyserve.engine.batch import Step, padded_sizes
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.graphs import graph_sizes
from pyserve.engine.state import StepLimits

# Padded sizes above MANY_TOKENS are many, take long to run, and neighbours call much the same
# kernels. So only multiples of MANY_TOKENS_MULTIPLE are run before the first request. What a matrix
# library does when it first meets a shape takes tens of milliseconds at worst, so all sizes that
# steps commonly have while others decode are below MANY_TOKENS.
MANY_TOKENS = 2048
MANY_TOKENS_MULTIPLE = 512


def largest_step(limits: StepLimits) -> Step:
    """The step with the most tokens, rows and sampled rows."""
    return _step(limits, limits.max_num_batched_tokens)


def warmup_steps(limits: StepLimits, *, num_adapter_slots: int = 0) -> Iterator[Step]:
    """Yield a step for every padded number of tokens up to MANY_TOKENS and for some above, the
    largest first.

    With adapter slots, each is followed by a step whose tokens use them, as that calls other ops.
    """
    for num_tokens in reversed(padded_sizes(limits.max_num_batched_tokens)):
        is_between = num_tokens > MANY_TOKENS and num_tokens % MANY_TOKENS_MULTIPLE
        if is_between and num_tokens != limits.max_num_batched_tokens:
            continue
        yield from _with_and_without(_step(limits, num_tokens), num_adapter_slots)


def graph_steps(
    limits: StepLimits, *, num_blocks: int, vocab_size: int, num_adapter_slots: int = 0
) -> Iterator[Step]:
    """Yield a step for every shape that gets a CUDA graph, the largest first.

    Each number of tokens comes with as many rows as possible and with as few (decode and mixed
    steps have different graphs); with adapter slots, each once more as in `warmup_steps`.

    Unlike warmup_steps, which use token 0 and block 0 everywhere, these rows have tokens and KV
    blocks of their own, so that a graph that computes something else than its launches is found
    out. Shapes that need more than num_blocks blocks get no graph and run op by op.
    """
    for num_tokens in reversed(graph_sizes(limits.max_num_batched_tokens)):
        few_rows = -(-num_tokens // limits.max_model_len)
        for num_rows in {min(count, limits.num_slots) for count in (num_tokens, few_rows)}:
            step = _step(limits, num_tokens, num_rows=num_rows)
            if _use_blocks(step, limits.block_size, vocab_size) <= num_blocks:
                yield from _with_and_without(step, num_adapter_slots)


def _with_and_without(step: Step, num_adapter_slots: int) -> Iterator[Step]:
    """Yield the step; if there are adapter slots, also yield it with its tokens divided among them.
    The slots are still empty, so the results are the same."""
    yield step
    if num_adapter_slots:
        starts = [
            slot * step.num_tokens // num_adapter_slots for slot in range(num_adapter_slots + 1)
        ]
        yield replace(step, adapter_starts=starts)


def _use_blocks(step: Step, block_size: int, vocab_size: int) -> int:
    """Give each row its own KV blocks and token ids; returns the number of blocks used."""
    num_blocks = 0
    for slot, query_len in zip(step.row_slots, step.query_lens, strict=True):
        first = num_blocks * block_size
        step.host_tokens[slot] = [i % vocab_size for i in range(first, first + query_len)]
        for index in range(num_blocks_for(query_len, block_size)):
            step.block_updates += (slot, index, num_blocks)
            num_blocks += 1
    return num_blocks


def _step(limits: StepLimits, num_tokens: int, *, num_rows: int | None = None) -> Step:
    """A step of up to `num_tokens` tokens, all of whose rows are sampled.

    num_rows  None: as many rows as the limits allow.
    """
    if num_rows is None:
        num_rows = min(num_tokens, limits.num_slots)
    share, rest = divmod(num_tokens, num_rows)
    query_lens = [min(share + (row < rest), limits.max_model_len) for row in range(num_rows)]
    return Step(
        row_slots=list(range(num_rows)),
        query_lens=query_lens,
        host_tokens=[[0] * query_len for query_len in query_lens],
        row_samples=[True] * num_rows,
        num_tokens=sum(query_lens),
    )
