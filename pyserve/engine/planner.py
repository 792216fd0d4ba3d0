"""The memory plan: computes what fits before anything is allocated.

Its ledger lists the weights, the rope table, the tensors of state.py and the KV cache, and on a
card also the CUDA context, modules and graphs. No tensor size is repeated here: they come from a
model and a StepState on the meta device. On a card, `fit_kv` later gives the KV cache what is
really free.
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

MAX_NUM_BATCHED_TOKENS = 2048  # default of --max-num-batched-tokens
BIG_CARD_BYTES = 40 * 10**9
BIG_CARD_MAX_NUM_BATCHED_TOKENS = 8192  # the default on a card of at least BIG_CARD_BYTES
LOGITS_TILE_ROWS = 64  # rows of logits that exist at once
CARD_LOGITS_TILE_ROWS = 256  # larger on a card: the output head is read once for each tile

DEFAULT_KV_BYTES = 512 * MIB  # KV cache on a CPU, unless one sequence of max_model_len needs more
MAX_BLOCKS = 2**19  # KV blocks on a card; each block takes some 200 bytes of host memory
# Of the memory in use on a card before the model is loaded, we attribute at most this much to our
# own CUDA context, and the rest to other processes.
MAX_CONTEXT_BYTES = GIB
MODULE_BYTES = 256 * MIB  # kernels that are loaded on first use, and cuBLAS's workspace
GRAPHS = "CUDA graphs"  # the name of this entry of the ledger
TOLERANCE = 0.03  # relative error of the ledger above which is_ledger_true is false
MIN_TOLERANCE_BYTES = 64 * MIB  # an error that always passes, as drivers differ by that much


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The host memory that is available to serve on a CPU, before anything is loaded."""

    available_bytes: int


@dataclass(frozen=True, slots=True)
class CardMemory:
    """A card's memory as the driver shows it, while this process has a CUDA context there."""

    total_bytes: int
    used_bytes: int  # by all processes

    @property
    def context_bytes(self) -> int:
        """The part of used_bytes that is ours; valid only before the model is loaded."""
        return min(self.used_bytes, MAX_CONTEXT_BYTES)

    @property
    def others_bytes(self) -> int:
        """The part of used_bytes of other processes; valid only before the model is loaded."""
        return self.used_bytes - self.context_bytes


Memory = HostMemory | CardMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan(StepLimits):
    """What to allocate. The KV cache is the ledger's last entry."""

    num_blocks: int  # KV blocks
    block_bytes: int  # bytes of one KV block over all layers of this rank
    ledger: Ledger

    @property
    def total_bytes(self) -> int:
        """The sum of the ledger."""
        return _total(self.ledger)


def plan_memory(
    model: Decoder, config: EngineConfig, *, weight_bytes: int, memory: Memory
) -> MemoryPlan:
    """Divide `memory` among weights, activations, KV cache and the rest.

    model         the model on the meta device.
    weight_bytes  what its weights will take.

    Without --max-model-len the plan has the longest context that fits. Raises ConfigError if
    --max-model-len exceeds the model's context; PlanError with the ledger if --max-model-len does
    not fit, or no context fits at all.
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

    def ledger_without_kv(max_model_len: int) -> Ledger:
        """The ledger of everything but the KV cache."""
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

    def fitting_blocks(max_model_len: int) -> int:
        """Number of KV blocks that fit beside everything else."""
        free_bytes = allowed_bytes - _total(ledger_without_kv(max_model_len))
        if config.kv_cache_memory_bytes is not None:
            free_bytes = min(free_bytes, config.kv_cache_memory_bytes)
        return max(0, free_bytes) // block_bytes

    wanted_len = config.max_model_len or longest_len
    max_model_len = wanted_len
    if fitting_blocks(wanted_len) * block_size < wanted_len:
        # Find the longest context, in whole blocks, whose KV cache still fits beside the rest.
        lens = range(0, wanted_len + 1, block_size)
        num_fitting = bisect_left(lens, True, key=lambda n: fitting_blocks(n) * block_size < n)
        max_model_len = lens[num_fitting - 1]
        if config.max_model_len is not None or max_model_len < 1:
            num_blocks = num_blocks_for(wanted_len, block_size)
            ledger = _with_kv(ledger_without_kv(wanted_len), num_blocks * block_bytes)
            raise PlanError(_refusal(config, memory, wanted_len, max_model_len, ledger=ledger))
    num_blocks = fitting_blocks(max_model_len)
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
        ledger=_with_kv(ledger_without_kv(max_model_len), num_blocks * block_bytes),
    )


def fit_kv(
    plan: MemoryPlan, config: EngineConfig, *, before: CardMemory, now: CardMemory,
    block_bytes: int | None = None,
) -> MemoryPlan:  # fmt: skip
    """`plan` with as many KV blocks as a card has room for.

    Called when everything is allocated but the KV cache and the CUDA graphs.

    before, now   the card's memory before the model was loaded, and now.
    block_bytes   bytes of a KV block on that card if it belongs to another rank; None: the plan's.

    Without --max-model-len the context shrinks to what the blocks hold; with it, PlanError is
    raised if it does not fit any more.
    """
    # CUDA graphs refer to the KV cache and are recorded after it, so `now` does not have them yet.
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
    """Compare the ledger with the card's memory once everything is allocated.

    before, now  the card's memory before the model was loaded, and now.

    Returns whether they agree within the tolerance, and a line for the log.
    """
    shown_bytes = now.used_bytes - before.others_bytes
    difference = plan.total_bytes - shown_bytes
    line = (
        f"the ledger says {_gib(plan.total_bytes)}, the card shows {_gib(shown_bytes)} "
        f"({difference / max(1, shown_bytes):+.1%})"
    )
    return abs(difference) <= max(TOLERANCE * shown_bytes, MIN_TOLERANCE_BYTES), line


def format_ledger(ledger: Iterable[tuple[str, int]]) -> str:
    """The ledger as aligned lines in MiB, with the total at the end."""
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
    """The limit of the whole ledger in bytes."""
    if isinstance(memory, HostMemory):
        return int(memory.available_bytes * config.gpu_memory_utilization)
    allowed_bytes = int(memory.total_bytes * config.gpu_memory_utilization)
    return max(0, allowed_bytes - memory.others_bytes)


def _of_the_card(memory: CardMemory, tp_size: int) -> Ledger:
    """What a card needs besides tensors: CUDA context and modules, and buffers for all-reduces."""
    parts: Ledger = (("CUDA context", memory.context_bytes), ("CUDA modules", MODULE_BYTES))
    if tp_size > 1:
        # NCCL's own buffers (0.7 GiB between two H200s) depend on the links between the cards.
        # They are not in the ledger, but fit_kv measures them as used memory.
        parts += (("sums over cards", peer_layout.num_bytes(tp_size)),)
    return parts


def _enough_blocks(limits: StepLimits, memory: Memory, one_seq: int, block_bytes: int) -> int:
    """The largest useful number of KV blocks; a sequence of max_model_len takes `one_seq`."""
    if isinstance(memory, CardMemory):
        return max(one_seq, MAX_BLOCKS)
    return max(one_seq, min(limits.num_slots * one_seq, DEFAULT_KV_BYTES // block_bytes))


def _with_kv(without_kv: Ledger, kv_bytes: int) -> Ledger:
    return (*without_kv, ("KV cache", kv_bytes))


def _refusal(
    config: EngineConfig, memory: Memory, wanted_len: int, fitting_len: int, *, ledger: Ledger
) -> str:
    """An error message: what does not fit, why and what would, on one line; then the ledger."""
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
