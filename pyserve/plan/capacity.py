"""Capacity: what of a model fits a card, by the planner's formulas; the card need not be here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pyserve.config import EngineConfig
from pyserve.engine import devices
from pyserve.engine.block_manager import num_blocks_for
from pyserve.engine.planner import MIB, CardMemory, MemoryPlan, plan_memory
from pyserve.model.config import ModelConfig
from pyserve.plan.cards import CONTEXT_BYTES, Card
from pyserve.plan.roofline import ModelSizes, measure_model

CUDA = torch.device("cuda", 0)
UNLIMITED = CardMemory(total_bytes=2**50, used_bytes=CONTEXT_BYTES)


@dataclass(frozen=True, slots=True)
class Capacity:
    """A model, the settings it would run with, a card's memory, and the plan for it."""

    model: ModelConfig
    config: EngineConfig
    sizes: ModelSizes
    memory: CardMemory
    plan: MemoryPlan

    @property
    def num_tokens(self) -> int:
        """Of the KV cache."""
        return self.plan.num_blocks * self.config.block_size

    def longest_context(self, num_seqs: int) -> int:
        """Of each of num_seqs sequences that run at once; 0 where they do not."""
        blocks_each = self.plan.num_blocks // num_seqs
        return min(self.plan.max_model_len, blocks_each * self.config.block_size)

    def bytes_for(self, context_len: int, num_seqs: int) -> int:
        """The whole ledger where that is what the KV cache must hold, on any card."""
        num_blocks = num_seqs * num_blocks_for(context_len, self.config.block_size)
        config = dataclasses.replace(
            self.config,
            max_model_len=context_len,
            max_num_batched_tokens=self.plan.max_num_batched_tokens,
            gpu_memory_utilization=1.0,
            kv_cache_memory_bytes=num_blocks * self.plan.block_bytes,
        )
        return _plan(config, self.sizes, UNLIMITED).total_bytes


def named_memory(card: Card) -> CardMemory:
    """What a card of that kind shows when nothing but our CUDA context is on it."""
    return CardMemory(total_bytes=card.memory_mib * MIB, used_bytes=CONTEXT_BYTES)


def sizes_on_card(model: ModelConfig, config: EngineConfig, *, tp_size: int = 1) -> ModelSizes:
    """Raises ConfigError where a card cannot run its dtype or one of tp_size parts. What else a
    card's kernels lack for it is the caller's to say: ModelConfig.lacking_on_cuda."""
    dtype = devices.resolve_dtype(config.dtype, model.dtype, CUDA)
    return measure_model(model, dtype, tp_size=tp_size)


def find_capacity(
    model: ModelConfig, config: EngineConfig, sizes: ModelSizes, memory: CardMemory
) -> Capacity:
    """Raises PlanError, with the ledger, where it does not fit."""
    return Capacity(model, config, sizes, memory, _plan(config, sizes, memory))


def _plan(config: EngineConfig, sizes: ModelSizes, memory: CardMemory) -> MemoryPlan:
    """planner.plan_memory, as the server calls it."""
    return plan_memory(sizes.shapes, config, weight_bytes=sizes.weight_bytes, memory=memory)
