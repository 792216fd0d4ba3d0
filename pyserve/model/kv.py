"""KVSpec: what one layer keeps in the KV cache; all that planner and block manager know of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

KVCache = tuple[torch.Tensor, ...]  # one layer's; only the attention that asked for it looks inside


class KVTensor(NamedTuple):
    """[num_blocks, block_size, *token_shape] of `dtype`."""

    token_shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True, frozen=True)
class KVSpec:
    """The tensors of one layer, in the order in which its attention takes them.

    window   tokens the layer looks back on, the newest included; 0: all of them.
    """

    tensors: tuple[KVTensor, ...]
    window: int = 0

    @classmethod
    def of_heads(
        cls, num_kv_heads: int, head_dim: int, dtype: torch.dtype, window: int = 0
    ) -> KVSpec:
        """Two tensors of the same shape: keys, then values."""
        return cls((KVTensor((num_kv_heads, head_dim), dtype),) * 2, window)

    def bytes_per_block(self, block_size: int) -> int:
        """Of all tensors together."""
        return block_size * sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors)

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> KVCache:
        """Zeros, so that the memory is there at once and does not grow while serving."""
        return tuple(
            torch.empty((num_blocks, block_size, *shape), dtype=dtype, device=device).zero_()
            for shape, dtype in self.tensors
        )
