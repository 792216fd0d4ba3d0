"""ForwardContext: the inputs of a forward pass that all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pyserve.model.activations import Activations
from pyserve.model.kv import KVCache
from pyserve.ops import AttentionPlan


class AdapterRows(NamedTuple):
    """Which tokens of a step use which adapter, and scratch memory.

    starts   int32 [num_adapter_slots + 1]: where each adapter slot's tokens begin, see ops/lora.py
    shrunk   scratch for x A^T: num_parts of a Linear -> float32 [num_splits, num_tokens, num_parts,
             max_rank], with num_splits of ops.lora.num_splits
    """

    starts: torch.Tensor
    shrunk: Mapping[int, torch.Tensor]


@dataclass(slots=True, frozen=True)
class ForwardContext:
    """One step of num_tokens tokens in num_rows rows, one for each sequence. Both numbers include
    padding, which is as ops.plan_step writes it.

    input_ids, positions   int32 [num_tokens]
    slot_mapping           int64 [num_tokens]: block_id * block_size + offset; -1 writes nothing
    row_slots              int32 [num_rows]: slot, and so row of block_table; -1: padding
    cu_seqlens_q           int32 [num_rows + 1]: where each row's tokens begin
    seq_lens               int32 [num_rows]: tokens in the KV cache after this step
    block_table            int32 [num_slots, max_blocks_per_seq]
    kv_caches              the KV cache of each layer, as its KVSpec says
    max_query_len          an upper bound of the rows' query lengths
    attention_plans        window -> plan, for each window that a layer has; empty on a CPU
    activations            memory for num_tokens tokens; layers allocate nothing themselves
    adapters               None if no token of the step uses an adapter
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    row_slots: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    kv_caches: list[KVCache]
    max_query_len: int
    attention_plans: Mapping[int, AttentionPlan]
    activations: Activations
    adapters: AdapterRows | None = None
