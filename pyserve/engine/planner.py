"""What fits: every formula about memory, the only copy.

The ledger is weights + activations of the largest step + logits + slots + step buffers + rope table
+ KV cache, all computed before anything is allocated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from pyserve.config import EngineConfig
from pyserve.engine.batch import LOGITS_TILE_ROWS, max_step_words
from pyserve.engine.block_manager import num_blocks_for
from pyserve.errors import ConfigError, PlanError
from pyserve.model.config import ModelConfig
from pyserve.model.kv import KVSpec
from pyserve.ops import step_layout as layout

DEFAULT_KV_BYTES = 512 * 2**20  # of the KV cache on a CPU, where one sequence does not need more
FLOAT32_BYTES = 4
PLAN_BYTES_PER_TOKEN = 4 + 4 + 8  # of ops.StepPlan: input_ids, positions, slot_mapping
PLAN_BYTES_PER_ROW = 4 + 4 + 4 + 8 + 4  # row_slots, cu_seqlens_q, seq_lens, sample_rows, sampled


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What to allocate. `ledger` is (name, bytes), the KV cache last."""

    num_slots: int
    max_model_len: int  # tokens
    num_blocks: int
    ledger: tuple[tuple[str, int], ...]


def plan_memory(
    model: ModelConfig, config: EngineConfig, *, weight_bytes: int, kv_specs: list[KVSpec],
    itemsize: int, available_bytes: int,
) -> MemoryPlan:  # fmt: skip
    """Share out `available_bytes` (what could be taken before anything was loaded).

    `itemsize` is that of the compute dtype. Raises ConfigError where --max-model-len is more than
    the model's context, PlanError with the ledger where it, or any context at all, does not fit.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_model_len:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, the limit of this model is "
            f"{model.max_model_len}"
        )
    block_size = config.block_size
    num_slots = min(config.max_num_seqs, config.max_num_batched_tokens)
    allowed_bytes = int(available_bytes * config.gpu_memory_utilization)
    block_bytes = sum(spec.bytes_per_block(block_size) for spec in kv_specs)

    def fixed(max_model_len: int) -> list[tuple[str, int]]:
        return _fixed_ledger(
            model, config, weight_bytes=weight_bytes, itemsize=itemsize, num_slots=num_slots,
            max_model_len=max_model_len,
        )  # fmt: skip

    def room(max_model_len: int) -> int:
        """Blocks that fit beside everything else."""
        free_bytes = allowed_bytes - _total(fixed(max_model_len))
        if config.kv_cache_memory_bytes is not None:
            free_bytes = min(free_bytes, config.kv_cache_memory_bytes)
        return max(0, free_bytes) // block_bytes

    wanted_len = config.max_model_len or model.max_model_len
    max_model_len = wanted_len
    if room(wanted_len) * block_size < wanted_len:
        # The largest whole number of blocks that one sequence can have.
        lens = range(0, wanted_len + 1, block_size)
        num_fitting = bisect_left(lens, True, key=lambda n: room(n) * block_size < n)
        max_model_len = lens[num_fitting - 1]
        if config.max_model_len is not None or max_model_len < 1:
            raise _plan_error(
                fixed(wanted_len), wanted_len, max_model_len,
                kv_bytes=num_blocks_for(wanted_len, block_size) * block_bytes,
                allowed_bytes=allowed_bytes, config=config,
            )  # fmt: skip
    num_blocks = room(max_model_len)
    if config.kv_cache_memory_bytes is None:
        one_seq = num_blocks_for(max_model_len, block_size)
        enough = max(one_seq, min(num_slots * one_seq, DEFAULT_KV_BYTES // block_bytes))
        num_blocks = min(num_blocks, enough)
    ledger = (*fixed(max_model_len), ("KV cache", num_blocks * block_bytes))
    return MemoryPlan(num_slots, max_model_len, num_blocks, ledger)


def activation_bytes(model: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Most that is alive at once in a forward of num_tokens tokens.

    Residual, normed input and output of a block, and what the block holds in between: q, k, v and
    the attention's output, or gate, up and their product.
    """
    q_size = model.num_heads * model.head_dim
    kv_size = model.num_kv_heads * model.head_dim
    attention = 3 * model.hidden_size + 2 * q_size + 2 * kv_size
    mlp = 2 * model.hidden_size + 3 * model.intermediate_size
    return num_tokens * itemsize * max(attention, mlp)


def logits_bytes(model: ModelConfig, num_slots: int, itemsize: int) -> int:
    """One tile of logits and the hidden states it is made from."""
    num_rows = min(num_slots, LOGITS_TILE_ROWS)
    return num_rows * itemsize * (model.vocab_size + model.hidden_size)


def slot_bytes(model: ModelConfig, num_slots: int, max_blocks_per_seq: int) -> int:
    """Slot rows, block table and penalty counts."""
    return num_slots * (4 * layout.SLOT_WORDS + 4 * max_blocks_per_seq + 2 * model.vocab_size)


def step_buffer_bytes(config: EngineConfig, num_slots: int, max_model_len: int) -> int:
    """The packed step and what the plan op derives from it."""
    num_words = max_step_words(
        config.max_num_batched_tokens, num_slots, max_model_len=max_model_len,
        block_size=config.block_size,
    )  # fmt: skip
    return (
        4 * num_words
        + PLAN_BYTES_PER_TOKEN * config.max_num_batched_tokens
        + PLAN_BYTES_PER_ROW * num_slots
        + 4  # cu_seqlens_q has one entry more
    )


def format_ledger(ledger: Iterable[tuple[str, int]]) -> str:
    """Aligned lines, a sum at the end."""
    rows = list(ledger)
    rows.append(("total", _total(rows)))
    return "\n".join(f"  {name:<16}{num_bytes / 2**20:>12,.1f} MiB" for name, num_bytes in rows)


def _fixed_ledger(
    model: ModelConfig, config: EngineConfig, *, weight_bytes: int, itemsize: int, num_slots: int,
    max_model_len: int,
) -> list[tuple[str, int]]:  # fmt: skip
    max_blocks_per_seq = num_blocks_for(max_model_len, config.block_size)
    return [
        ("weights", weight_bytes),
        ("rope table", FLOAT32_BYTES * max_model_len * model.head_dim),
        ("activations", activation_bytes(model, config.max_num_batched_tokens, itemsize)),
        ("logits", logits_bytes(model, num_slots, itemsize)),
        ("slots", slot_bytes(model, num_slots, max_blocks_per_seq)),
        ("step buffers", step_buffer_bytes(config, num_slots, max_model_len)),
    ]


def _plan_error(
    fixed: list[tuple[str, int]], wanted_len: int, fitting_len: int, *, kv_bytes: int,
    allowed_bytes: int, config: EngineConfig,
) -> PlanError:  # fmt: skip
    limit = (
        f"{allowed_bytes / 2**20:,.1f} MiB may be used "
        f"(--gpu-memory-utilization {config.gpu_memory_utilization} of what is free)"
    )
    if config.kv_cache_memory_bytes is not None:
        limit += f", of it {config.kv_cache_memory_bytes / 2**20:,.1f} MiB for the KV cache"
    remedy = f"at most {fitting_len} would fit" if fitting_len > 0 else "nothing would fit"
    ledger = format_ledger([*fixed, ("KV cache", kv_bytes)])
    return PlanError(
        f"a context of {wanted_len} tokens does not fit: {limit}, {remedy}; it needs\n{ledger}"
    )


def _total(ledger: Iterable[tuple[str, int]]) -> int:
    return sum(num_bytes for _, num_bytes in ledger)
