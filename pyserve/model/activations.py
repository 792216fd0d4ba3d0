"""The activations of a forward pass: tensors that are views of one piece of memory, the Arena.

Decoder.activations takes all of them from an Arena, layer by layer, and no other list of them
exists. To learn their size, the planner has a model on the meta device take those of the largest
step. The executor has the model take them once for each padded number of tokens, and keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch

from pyserve.ops.experts import Routing

ALIGNMENT = 256  # bytes to which the start of each tensor is aligned


class Arena:
    """Hands out consecutive parts of `memory`, uint8 [size], from its beginning on.

    num_bytes   the most bytes that have been in use at once so far.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.num_bytes = 0
        self._memory = memory
        self._end = 0

    @classmethod
    def endless(cls) -> Arena:
        """An arena on the meta device that only counts bytes: its tensors have no memory."""
        return cls(torch.empty(2**60, dtype=torch.uint8, device="meta"))

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Take an uninitialised tensor of this shape and dtype."""
        num_bytes = prod(shape) * dtype.itemsize
        begin, self._end = self._end, self._end + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = max(self.num_bytes, self._end)
        assert self._end <= len(self._memory), "more than was planned"
        return self._memory[begin : begin + num_bytes].view(dtype).view(shape)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Give back what is taken within the `with`, so that later tensors share its memory."""
        begin = self._end
        yield
        self._end = begin


class AttentionActivations(NamedTuple):
    """Activations of Attention.

    qkv      [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    q        [num_tokens, num_heads, head_dim], a view of the first part of qkv
    heads    [num_tokens, num_heads, head_dim], the output of attention
    joined   the same memory as [num_tokens, num_heads * head_dim]
    """

    qkv: torch.Tensor
    q: torch.Tensor
    heads: torch.Tensor
    joined: torch.Tensor


class LatentActivations(NamedTuple):
    """Activations of LatentAttention; the first dimension of each is num_tokens.

    compressed   [.., q_lora_rank + kv_lora_rank + qk_rope_head_dim]
    q            [.., num_heads, qk_nope_head_dim + qk_rope_head_dim]
    absorbed     [.., num_heads, kv_lora_rank + qk_rope_head_dim], queries of the cached latents
    latents      [.., num_heads, kv_lora_rank], the attention-weighted sums of cached latents
    heads        [.., num_heads, v_head_dim], the output of attention
    """

    compressed: torch.Tensor
    q: torch.Tensor
    absorbed: torch.Tensor
    latents: torch.Tensor
    heads: torch.Tensor


class MLPActivations(NamedTuple):
    """Activations of MLP: gate_up [num_tokens, 2 n], and activation(gate) * up [num_tokens, n]."""

    gate_up: torch.Tensor
    activated: torch.Tensor


class ExpertsActivations(NamedTuple):
    """Activations of Experts. A row is one assignment of a token to an expert; rows are sorted by
    expert.

    routing      which experts the tokens go to
    activated    [num_tokens * top_k, size]
    rows         [num_tokens * top_k, hidden_size], first the inputs, then the experts' outputs
    shared       activations of the shared expert; None without one
    shared_out   [num_tokens, hidden_size], the output of the shared expert; None without one
    """

    routing: Routing
    activated: torch.Tensor
    rows: torch.Tensor
    shared: MLPActivations | None
    shared_out: torch.Tensor | None


LayerActivations = tuple[
    AttentionActivations | LatentActivations, MLPActivations | ExpertsActivations
]


class Activations(NamedTuple):
    """Activations of a decoder; [num_tokens, hidden_size] where no shape is given.

    hidden     the input of a block; at the end, the hidden states after the last norm. It is at the
               beginning of the arena for every number of tokens.
    residual   the residual stream
    output     the output of a block that does not itself add to the residual; empty if all do
    squares    float32 [num_tokens, num_squares(hidden_size)]: sums of squares for norms that are
               fused into the linears around them, in small steps; None if norms are separate calls
    layers     activations of each layer; all layers, and a layer's attention and MLP, share memory
    shrunk     x A^T of the adapters, as in AdapterRows; empty without adapter slots
    """

    hidden: torch.Tensor
    residual: torch.Tensor
    output: torch.Tensor
    squares: torch.Tensor | None
    layers: list[LayerActivations]
    shrunk: Mapping[int, torch.Tensor]
