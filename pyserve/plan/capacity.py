"""Capacity: how much of a model fits on a card, by the planner's formulas. No card is needed."""

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
    """A model, the settings to run it with, a card's memory, and the memory plan for all of these.

    With tensor parallelism, memory and plan are those of one card.
    """

    model: ModelConfig
    config: EngineConfig
    sizes: ModelSizes
    memory: CardMemory
    plan: MemoryPlan

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the KV cache holds."""
        return self.plan.num_blocks * self.config.block_size

    def longest_context(self, num_seqs: int) -> int:
        """Longest context in tokens if num_seqs sequences run at once; 0 if so many do not fit."""
        blocks_each = self.plan.num_blocks // num_seqs
        return min(self.plan.max_model_len, blocks_each * self.config.block_size)

    def bytes_for(self, context_len: int, num_seqs: int) -> int:
        """Bytes of one card that are needed for num_seqs contexts of context_len tokens in the KV
        cache, and for everything else in the ledger. The size of the card does not matter.
        """
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
    """The memory that CUDA shows of such a card with only our CUDA context on it."""
    return CardMemory(total_bytes=card.memory_mib * MIB, used_bytes=CONTEXT_BYTES)


def sizes_on_card(model: ModelConfig, config: EngineConfig, *, tp_size: int = 1) -> ModelSizes:
    """The sizes of a model on one of `tp_size` cards.

    Raises ConfigError if cards cannot run its dtype or cannot share its layers. The caller checks
    what else the kernels on a card lack for the model: ModelConfig.lacking_on_cuda.
    """
    dtype = devices.resolve_dtype(config.dtype, model.dtype, CUDA)
    return measure_model(model, dtype, tp_size=tp_size)


def find_capacity(
    model: ModelConfig, config: EngineConfig, sizes: ModelSizes, memory: CardMemory
) -> Capacity:
    """The capacity of a card for a model. Raises PlanError, with the ledger, if it does not fit."""
    return Capacity(model, config, sizes, memory, _plan(config, sizes, memory))


def _plan(config: EngineConfig, sizes: ModelSizes, memory: CardMemory) -> MemoryPlan:
    """The memory plan, made by planner.plan_memory as in the server. Raises PlanError."""
    return plan_memory(sizes.shapes, config, weight_bytes=sizes.weight_bytes, memory=memory)
