"""What fits: the plan of all memory, made before anything is allocated.

The ledger is the weights, the rope table, what state.py lists and the KV cache; on a card its CUDA
context and modules too. No tensor's size is written down here: a model and a StepState on the meta
device are asked for theirs. On a card `fit_kv` then gives the KV cache what is really free.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pyserve.config import EngineConfig
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.graphs import graphs_bytes
from pyserve.engine.state import Ledger, StepLimits, StepState
from pyserve.errors import ConfigError, PlanError
from pyserve.model.decoder import Decoder
from pyserve.ops import peer_layout

MIB = 2**20
GIB = 2**30

MAX_NUM_BATCHED_TOKENS = 2048  # where --max-num-batched-tokens is not given
BIG_CARD_BYTES = 40 * 10**9
BIG_CARD_MAX_NUM_BATCHED_TOKENS = 8192
LOGITS_TILE_ROWS = 64  # rows of logits that exist at once
CARD_LOGITS_TILE_ROWS = 256  # so many rows read the output head once

DEFAULT_KV_BYTES = 512 * MIB  # of the KV cache on a CPU, where one sequence does not need more
MAX_BLOCKS = 2**19  # of the KV cache on a card: each takes some 200 bytes of the host's memory
# Of the memory that is in use before the model is loaded, so much at most is taken for our own CUDA
# context. What is more belongs to other processes.
MAX_CONTEXT_BYTES = GIB
MODULE_BYTES = 256 * MIB  # code loaded when it is first called, the matrix library's workspace
GRAPHS = "CUDA graphs"  # in the ledger
TOLERANCE = 0.03  # of the ledger
MIN_TOLERANCE_BYTES = 64 * MIB  # by which drivers differ


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
        """Of used_bytes, before the model is loaded: what this process holds."""
        return min(self.used_bytes, MAX_CONTEXT_BYTES)

    @property
    def others_bytes(self) -> int:
        """Of used_bytes, before the model is loaded: what other processes hold."""
        return self.used_bytes - self.context_bytes


Memory = HostMemory | CardMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan(StepLimits):
    """What to allocate. The KV cache is the ledger's last entry."""

    num_blocks: int
    block_bytes: int
    ledger: Ledger

    @property
    def total_bytes(self) -> int:
        return _total(self.ledger)


def plan_memory(
    model: Decoder, config: EngineConfig, *, weight_bytes: int, memory: Memory
) -> MemoryPlan:
    """Share out `memory` for `model`, made on the meta device.

    Raises ConfigError where --max-model-len is more than the model's context, PlanError with the
    ledger where it, or any context at all, does not fit.
    """
    longest_len = model.config.max_model_len
    if config.max_model_len is not None and config.max_model_len > longest_len:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}, the limit of this model is {longest_len}"
        )
    block_size = config.block_size
    limits = _limits(config, memory, longest_len)
    allowed_bytes = _allowed_bytes(config, memory)
    block_bytes = sum(spec.bytes_per_block(block_size) for spec in model.kv_specs())
    graph_bytes = 0
    if config.has_graphs:
        graph_bytes = graphs_bytes(
            len(model.layers),
            max_num_tokens=limits.max_num_batched_tokens,
            num_slots=limits.num_slots,
            has_adapters=model.num_adapter_slots > 0,
        )

    def fixed(max_model_len: int) -> Ledger:
        """All but the KV cache."""
        parts: Ledger = (
            ("weights", weight_bytes),
            ("rope table", model.bytes_per_position() * max_model_len),
        )
        if model.adapter_bytes:
            parts += (("adapters", model.adapter_bytes),)
        if model.scratch.num_bytes:
            parts += (("plain weights", model.scratch.num_bytes),)
        if isinstance(memory, CardMemory):
            parts = (*_of_the_card(memory, model.placement.tp_size), (GRAPHS, graph_bytes), *parts)
        limits_here = replace(limits, max_model_len=max_model_len)
        state = StepState(model, limits_here, is_card=isinstance(memory, CardMemory))
        return parts + state.ledger()

    def room(max_model_len: int) -> int:
        """Blocks that fit beside everything else."""
        free_bytes = allowed_bytes - _total(fixed(max_model_len))
        if config.kv_cache_memory_bytes is not None:
            free_bytes = min(free_bytes, config.kv_cache_memory_bytes)
        return max(0, free_bytes) // block_bytes

    wanted_len = config.max_model_len or longest_len
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
        num_blocks = min(num_blocks, _enough_blocks(limits, memory, one_seq, block_bytes))
    return MemoryPlan(
        num_slots=limits.num_slots,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=block_size,
        logits_tile_rows=limits.logits_tile_rows,
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        ledger=_with_kv(fixed(max_model_len), num_blocks * block_bytes),
    )


def fit_kv(
    plan: MemoryPlan, config: EngineConfig, *, before: CardMemory, now: CardMemory,
    block_bytes: int | None = None,
) -> MemoryPlan:  # fmt: skip
    """`plan` with the KV blocks that a card has room for, all but the records being allocated.

    before, now   what the card showed before the model came, and shows now.
    block_bytes   of a KV block there, where the card is another rank's.
    A context that nobody asked for shrinks with the blocks. Raises PlanError where --max-model-len
    does not fit any more.
    """
    # The records are made on the KV cache, so after it.
    used_bytes = now.used_bytes + dict(plan.ledger).get(GRAPHS, 0)
    left_bytes = int(now.total_bytes * config.gpu_memory_utilization) - used_bytes
    num_blocks = min(plan.num_blocks, max(0, left_bytes) // (block_bytes or plan.block_bytes))
    num_tokens = num_blocks * config.block_size
    wanted_len = plan.max_model_len if config.max_model_len is not None else 1
    if num_tokens < wanted_len:
        unknown_bytes = used_bytes - before.others_bytes - _total(plan.ledger[:-1])
        raise PlanError(
            f"a context of {wanted_len} tokens does not fit any more: {_gib(unknown_bytes)} of the "
            f"card went elsewhere while the model was loaded, see nvidia-smi; the plan was\n"
            f"{format_ledger(plan.ledger)}"
        )
    return replace(with_blocks(plan, num_blocks), max_model_len=min(plan.max_model_len, num_tokens))


def with_blocks(plan: MemoryPlan, num_blocks: int) -> MemoryPlan:
    """`plan` with another number of KV blocks."""
    ledger = _with_kv(plan.ledger[:-1], num_blocks * plan.block_bytes)
    return replace(plan, num_blocks=num_blocks, ledger=ledger)


def is_ledger_true(plan: MemoryPlan, *, before: CardMemory, now: CardMemory) -> tuple[bool, str]:
    """Holds the ledger against what the card shows with all of it allocated: (true, a line)."""
    shown_bytes = now.used_bytes - before.others_bytes
    difference = plan.total_bytes - shown_bytes
    line = (
        f"the ledger says {_gib(plan.total_bytes)}, the card shows {_gib(shown_bytes)} "
        f"({difference / max(1, shown_bytes):+.1%})"
    )
    return abs(difference) <= max(TOLERANCE * shown_bytes, MIN_TOLERANCE_BYTES), line


def format_ledger(ledger: Iterable[tuple[str, int]]) -> str:
    """Aligned lines, a sum at the end."""
    rows = list(ledger)
    rows.append(("total", _total(rows)))
    return "\n".join(f"  {name:<16}{num_bytes / MIB:>12,.1f} MiB" for name, num_bytes in rows)


def _limits(config: EngineConfig, memory: Memory, max_model_len: int) -> StepLimits:
    num_tokens, tile_rows = MAX_NUM_BATCHED_TOKENS, LOGITS_TILE_ROWS
    if isinstance(memory, CardMemory):
        tile_rows = CARD_LOGITS_TILE_ROWS
        if memory.total_bytes >= BIG_CARD_BYTES:
            num_tokens = BIG_CARD_MAX_NUM_BATCHED_TOKENS
    num_tokens = config.max_num_batched_tokens or num_tokens
    num_slots = min(config.max_num_seqs, num_tokens)
    return StepLimits(
        num_slots=num_slots,
        max_num_batched_tokens=num_tokens,
        max_model_len=max_model_len,
        block_size=config.block_size,
        logits_tile_rows=min(tile_rows, num_slots),
    )


def _allowed_bytes(config: EngineConfig, memory: Memory) -> int:
    """What the whole ledger may take."""
    if isinstance(memory, HostMemory):
        return int(memory.available_bytes * config.gpu_memory_utilization)
    allowed_bytes = int(memory.total_bytes * config.gpu_memory_utilization)
    return max(0, allowed_bytes - memory.others_bytes)


def _of_the_card(memory: CardMemory, tp_size: int) -> Ledger:
    """What it takes to use a card at all, and to share the work with others."""
    parts: Ledger = (("CUDA context", memory.context_bytes), ("CUDA modules", MODULE_BYTES))
    if tp_size > 1:
        # NCCL's buffers depend on the links: fit_kv sees them, 0.7 GiB between two H200s.
        parts += (("sums over cards", peer_layout.num_bytes(tp_size)),)
    return parts


def _enough_blocks(limits: StepLimits, memory: Memory, one_seq: int, block_bytes: int) -> int:
    """The most blocks worth having; `one_seq` is the blocks of one whole context."""
    if isinstance(memory, CardMemory):
        return max(one_seq, MAX_BLOCKS)
    return max(one_seq, min(limits.num_slots * one_seq, DEFAULT_KV_BYTES // block_bytes))


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
