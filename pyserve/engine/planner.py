"""What fits: every formula about memory, the only copy.

The ledger is weights + activations of the largest step + logits + slots + step buffers + rope table
+ KV cache, on a card its CUDA context, modules and workspaces too: all of it computed before
anything is allocated. On a card `fit_kv` then gives the KV cache what is really free.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from pyserve.config import EngineConfig
from pyserve.engine.batch import max_step_words
from pyserve.engine.block_manager import num_blocks_for
from pyserve.errors import ConfigError, PlanError
from pyserve.model.config import ModelConfig
from pyserve.model.kv import KVSpec
from pyserve.ops import attention_plan, sample_workspace
from pyserve.ops import step_layout as layout

MIB = 2**20
GIB = 2**30
META = torch.device("meta")  # shapes without memory

MAX_NUM_BATCHED_TOKENS = 2048  # where --max-num-batched-tokens is not given
BIG_CARD_BYTES = 40 * 10**9
BIG_CARD_MAX_NUM_BATCHED_TOKENS = 8192
LOGITS_TILE_ROWS = 64  # rows of logits that exist at once
CARD_LOGITS_TILE_ROWS = 256  # so many rows read the output head once

DEFAULT_KV_BYTES = 512 * MIB  # of the KV cache on a CPU, where one sequence does not need more
MAX_BLOCKS = 2**19  # of the KV cache on a card: the host keeps some 200 bytes for each
# What is in use before the model comes is up to this our CUDA context; what is beyond, others'.
MAX_CONTEXT_BYTES = GIB
MODULE_BYTES = 256 * MIB  # code loaded when it is first called, the matrix library's workspace
TOLERANCE = 0.03  # of the ledger
MIN_TOLERANCE_BYTES = 64 * MIB  # by which drivers differ

FLOAT32_BYTES = 4
PLAN_BYTES_PER_TOKEN = 4 + 4 + 8  # of ops.StepPlan: input_ids, positions, slot_mapping
PLAN_BYTES_PER_ROW = 4 + 4 + 4 + 8 + 4  # row_slots, cu_seqlens_q, seq_lens, sample_rows, sampled

Ledger = tuple[tuple[str, int], ...]  # (name, bytes)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What there is for a CPU, before anything is loaded."""

    available_bytes: int


@dataclass(frozen=True, slots=True)
class CardMemory:
    """What a card shows while this process has its CUDA context there."""

    total_bytes: int
    used_bytes: int  # by whomever

    @property
    def context_bytes(self) -> int:
        """Of used_bytes before the model comes: ours."""
        return min(self.used_bytes, MAX_CONTEXT_BYTES)

    @property
    def others_bytes(self) -> int:
        """Of used_bytes before the model comes: what other processes hold."""
        return self.used_bytes - self.context_bytes


Memory = HostMemory | CardMemory


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What to allocate. The KV cache is the ledger's last entry."""

    num_slots: int
    max_num_batched_tokens: int
    logits_tile_rows: int
    max_model_len: int  # tokens
    num_blocks: int
    block_bytes: int
    ledger: Ledger

    @property
    def total_bytes(self) -> int:
        return _total(self.ledger)


def plan_memory(
    model: ModelConfig, config: EngineConfig, *, weight_bytes: int, kv_specs: list[KVSpec],
    itemsize: int, memory: Memory,
) -> MemoryPlan:  # fmt: skip
    """Share out `memory`.

    `itemsize` is that of the compute dtype. Raises ConfigError where --max-model-len is more than
    the model's context, PlanError with the ledger where it, or any context at all, does not fit.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_model_len:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, the limit of this model is "
            f"{model.max_model_len}"
        )
    block_size = config.block_size
    shape = _step_shape(config, memory)
    allowed_bytes = _allowed_bytes(config, memory)
    block_bytes = sum(spec.bytes_per_block(block_size) for spec in kv_specs)
    parts = _constant_parts(model, shape, memory, weight_bytes=weight_bytes, itemsize=itemsize)

    def fixed(max_model_len: int) -> Ledger:
        return parts + _parts_by_length(model, shape, max_model_len, block_size=block_size)

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
            num_blocks = num_blocks_for(wanted_len, block_size)
            ledger = _with_kv(fixed(wanted_len), num_blocks * block_bytes)
            raise PlanError(_refusal(config, memory, wanted_len, max_model_len, ledger=ledger))
    num_blocks = room(max_model_len)
    if config.kv_cache_memory_bytes is None:
        one_seq = num_blocks_for(max_model_len, block_size)
        num_blocks = min(num_blocks, _enough_blocks(shape, memory, one_seq, block_bytes))
    return MemoryPlan(
        num_slots=shape.num_slots,
        max_num_batched_tokens=shape.num_tokens,
        logits_tile_rows=shape.logits_tile_rows,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        ledger=_with_kv(fixed(max_model_len), num_blocks * block_bytes),
    )


def fit_kv(
    plan: MemoryPlan, config: EngineConfig, *, before: CardMemory, now: CardMemory
) -> MemoryPlan:
    """`plan` with the KV blocks that a card has room for, all the rest being allocated.

    before, now   what the card showed before the model came, and shows now.
    A context that nobody asked for shrinks with the blocks. Raises PlanError where --max-model-len
    does not fit any more.
    """
    left_bytes = int(now.total_bytes * config.gpu_memory_utilization) - now.used_bytes
    num_blocks = min(plan.num_blocks, max(0, left_bytes) // plan.block_bytes)
    num_tokens = num_blocks * config.block_size
    wanted_len = plan.max_model_len if config.max_model_len is not None else 1
    if num_tokens < wanted_len:
        unknown_bytes = now.used_bytes - before.others_bytes - _total(plan.ledger[:-1])
        raise PlanError(
            f"a context of {wanted_len} tokens does not fit any more: {_gib(unknown_bytes)} of the "
            f"card went elsewhere while the model was loaded, see nvidia-smi; the plan was\n"
            f"{format_ledger(plan.ledger)}"
        )
    return replace(
        plan,
        num_blocks=num_blocks,
        max_model_len=min(plan.max_model_len, num_tokens),
        ledger=_with_kv(plan.ledger[:-1], num_blocks * plan.block_bytes),
    )


def is_ledger_true(plan: MemoryPlan, *, before: CardMemory, now: CardMemory) -> tuple[bool, str]:
    """Holds the ledger against what the card shows with all of it allocated: (true, a line)."""
    shown_bytes = now.used_bytes - before.others_bytes
    difference = plan.total_bytes - shown_bytes
    line = (
        f"the ledger says {_gib(plan.total_bytes)}, the card shows {_gib(shown_bytes)} "
        f"({difference / max(1, shown_bytes):+.1%})"
    )
    return abs(difference) <= max(TOLERANCE * shown_bytes, MIN_TOLERANCE_BYTES), line


def activation_bytes(
    model: ModelConfig, num_tokens: int, itemsize: int, *, is_pooled: bool = False
) -> int:
    """What a forward of num_tokens tokens takes.

    Residual, normed input and output of a block, and what the block holds in between: q, k, v and
    the attention's output, or gate, up and their product. Pooled, as torch's memory on a card is:
    what the attention gave back is too small for the MLP and stays.
    """
    q_size = model.num_heads * model.head_dim
    kv_size = model.num_kv_heads * model.head_dim
    attention = 3 * model.hidden_size + 2 * q_size + 2 * kv_size
    between = 3 * model.intermediate_size
    if is_pooled:
        return num_tokens * itemsize * (attention + between)
    return num_tokens * itemsize * max(attention, 2 * model.hidden_size + between)


def logits_bytes(model: ModelConfig, num_rows: int, itemsize: int) -> int:
    """A tile of logits and the hidden states it is made from."""
    return num_rows * itemsize * (model.vocab_size + model.hidden_size)


def slot_bytes(model: ModelConfig, num_slots: int, max_blocks_per_seq: int) -> int:
    """Slot rows, block table and penalty counts."""
    return num_slots * (4 * layout.SLOT_WORDS + 4 * max_blocks_per_seq + 2 * model.vocab_size)


def step_buffer_bytes(
    num_tokens: int, num_slots: int, *, max_model_len: int, block_size: int
) -> int:
    """The packed step and what the plan op derives from it."""
    num_words = max_step_words(
        num_tokens, num_slots, max_model_len=max_model_len, block_size=block_size
    )
    return (
        4 * num_words
        + PLAN_BYTES_PER_TOKEN * num_tokens
        + PLAN_BYTES_PER_ROW * num_slots
        + 4  # cu_seqlens_q has one entry more
    )


def format_ledger(ledger: Iterable[tuple[str, int]]) -> str:
    """Aligned lines, a sum at the end."""
    rows = list(ledger)
    rows.append(("total", _total(rows)))
    return "\n".join(f"  {name:<16}{num_bytes / MIB:>12,.1f} MiB" for name, num_bytes in rows)


@dataclass(frozen=True, slots=True)
class _StepShape:
    """The largest step."""

    num_tokens: int
    num_slots: int
    logits_tile_rows: int


def _step_shape(config: EngineConfig, memory: Memory) -> _StepShape:
    num_tokens, tile_rows = MAX_NUM_BATCHED_TOKENS, LOGITS_TILE_ROWS
    if isinstance(memory, CardMemory):
        tile_rows = CARD_LOGITS_TILE_ROWS
        if memory.total_bytes >= BIG_CARD_BYTES:
            num_tokens = BIG_CARD_MAX_NUM_BATCHED_TOKENS
    num_tokens = config.max_num_batched_tokens or num_tokens
    num_slots = min(config.max_num_seqs, num_tokens)
    return _StepShape(num_tokens, num_slots, min(tile_rows, num_slots))


def _allowed_bytes(config: EngineConfig, memory: Memory) -> int:
    """What the whole ledger may take."""
    if isinstance(memory, HostMemory):
        return int(memory.available_bytes * config.gpu_memory_utilization)
    allowed_bytes = int(memory.total_bytes * config.gpu_memory_utilization)
    return max(0, allowed_bytes - memory.others_bytes)


def _enough_blocks(shape: _StepShape, memory: Memory, one_seq: int, block_bytes: int) -> int:
    """The most blocks worth having; `one_seq` is the blocks of one whole context."""
    if isinstance(memory, CardMemory):
        return max(one_seq, MAX_BLOCKS)
    return max(one_seq, min(shape.num_slots * one_seq, DEFAULT_KV_BYTES // block_bytes))


def _constant_parts(
    model: ModelConfig, shape: _StepShape, memory: Memory, *, weight_bytes: int, itemsize: int
) -> Ledger:
    """What does not depend on max_model_len."""
    is_card = isinstance(memory, CardMemory)
    parts = (
        ("weights", weight_bytes),
        ("activations", activation_bytes(model, shape.num_tokens, itemsize, is_pooled=is_card)),
        ("logits", logits_bytes(model, shape.logits_tile_rows, itemsize)),
    )
    if not isinstance(memory, CardMemory):
        return parts
    work = attention_plan.allocate(
        shape.num_tokens, shape.num_slots, num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, device=META,
    )  # fmt: skip
    sampling = sample_workspace.allocate(shape.logits_tile_rows, model.vocab_size, device=META)
    return (
        ("CUDA context", memory.context_bytes),
        ("CUDA modules", MODULE_BYTES),
        *parts,
        ("attention plans", len(set(model.windows)) * (work.work.nbytes + work.workspace.nbytes)),
        ("sampling", sampling.nbytes),
    )


def _parts_by_length(
    model: ModelConfig, shape: _StepShape, max_model_len: int, *, block_size: int
) -> Ledger:
    """What depends on max_model_len, the KV cache apart."""
    step_buffers = step_buffer_bytes(
        shape.num_tokens, shape.num_slots, max_model_len=max_model_len, block_size=block_size
    )
    max_blocks_per_seq = num_blocks_for(max_model_len, block_size)
    return (
        ("rope table", FLOAT32_BYTES * max_model_len * model.head_dim),
        ("slots", slot_bytes(model, shape.num_slots, max_blocks_per_seq)),
        ("step buffers", step_buffers),
    )


def _with_kv(fixed: Ledger, kv_bytes: int) -> Ledger:
    return (*fixed, ("KV cache", kv_bytes))


def _refusal(
    config: EngineConfig, memory: Memory, wanted_len: int, fitting_len: int, *, ledger: Ledger
) -> str:
    """What does not fit and why, on the first line; then the ledger."""
    limit = f"(--gpu-memory-utilization {config.gpu_memory_utilization} of "
    help_by_others = ""
    if isinstance(memory, HostMemory):
        limit += "what is free)"
    else:
        limit += f"the card's {memory.total_bytes / MIB:,.1f} MiB"
        if memory.others_bytes:
            limit += f", less {memory.others_bytes / MIB:,.1f} MiB that other processes hold"
            help_by_others = ", or end the other processes (see nvidia-smi)"
        limit += ")"
    limit = f"{_allowed_bytes(config, memory) / MIB:,.1f} MiB may be used {limit}"
    if config.kv_cache_memory_bytes is not None:
        limit += f", of it {config.kv_cache_memory_bytes / MIB:,.1f} MiB for the KV cache"
    remedy = "nothing would fit: take a smaller model or step (--max-num-batched-tokens)"
    if fitting_len > 0:
        remedy = f"--max-model-len {fitting_len} is the most that would"
    return (
        f"a context of {wanted_len} tokens does not fit: {limit}; {remedy}{help_by_others}. "
        f"It needs\n{format_ledger(ledger)}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"


def _total(ledger: Iterable[tuple[str, int]]) -> int:
    return sum(num_bytes for _, num_bytes in ledger)
