"""KVSpec: what one layer keeps in the KV cache; all that planner and block manager know of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, frozen=True)
class KVSpec:
    """Two tensors, keys and values: [num_blocks, block_size, num_kv_heads, head_dim] of `dtype`.

    window   tokens the layer looks back on, the newest included; 0: all of them.
    group    layers of one group share block tables.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int = 0
    group: int = 0

    def bytes_per_block(self, block_size: int) -> int:
        """Of keys and values together."""
        return 2 * block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize
