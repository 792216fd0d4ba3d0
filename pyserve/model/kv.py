"""KVSpec: the tensors that one layer keeps in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

KVCache = tuple[torch.Tensor, ...]  # one layer's tensors, opaque to all but the layer's attention


class KVTensor(NamedTuple):
    """Describes a tensor [num_blocks, block_size, *token_shape] of `dtype`."""

    token_shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(slots=True, frozen=True)
class KVSpec:
    """The tensors of one layer, in the order in which its attention expects them.

    window   number of tokens that a token attends to, itself included; 0: all.
    """

    tensors: tuple[KVTensor, ...]
    window: int = 0

    @classmethod
    def of_heads(
        cls, num_kv_heads: int, head_dim: int, dtype: torch.dtype, window: int = 0
    ) -> KVSpec:
        """The spec of ordinary attention: two tensors of the same shape, keys and values."""
        return cls((KVTensor((num_kv_heads, head_dim), dtype),) * 2, window)

    def bytes_per_block(self, block_size: int) -> int:
        """Bytes that one block takes in all tensors together."""
        return block_size * sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors)

    def allocate(self, num_blocks: int, block_size: int, device: torch.device) -> KVCache:
        """Allocate the tensors. Zeroing touches all pages, so that memory does not grow later."""
        return tuple(
            torch.empty((num_blocks, block_size, *shape), dtype=dtype, device=device).zero_()
            for shape, dtype in self.tensors
        )
