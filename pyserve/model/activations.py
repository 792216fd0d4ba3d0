"""The activations of a forward pass: tensors that are cut from one piece of memory.

Each layer takes what it needs from an Arena, in `Decoder.activations`. That is the only list: the
planner lets a model on the meta device take the largest step's and asks the arena how much it was;
the executor lets the model take those of each padded number of tokens once, and keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch

from pyserve.ops.experts import Routing

ALIGNMENT = 256  # bytes, of each tensor


class Arena:
    """Cuts `memory`, uint8 [num_bytes], from its beginning on.

    num_bytes   taken so far, at most at once.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self.num_bytes = 0
        self._memory = memory
        self._end = 0

    @classmethod
    def endless(cls) -> Arena:
        """One that only counts: its tensors have no memory."""
        return cls(torch.empty(2**60, dtype=torch.uint8, device="meta"))

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = prod(shape) * dtype.itemsize
        begin, self._end = self._end, self._end + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = max(self.num_bytes, self._end)
        assert self._end <= len(self._memory), "more than was planned"
        return self._memory[begin : begin + num_bytes].view(dtype).view(shape)

    @contextmanager
    def reused(self) -> Iterator[None]:
        """What is taken within is given back, for what is taken next."""
        begin = self._end
        yield
        self._end = begin


class AttentionActivations(NamedTuple):
    """Of Attention; q, heads and joined are views.

    qkv      [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    q        [num_tokens, num_heads, head_dim], the first part of qkv
    heads    [num_tokens, num_heads, head_dim], what attention gives
    joined   heads as [num_tokens, num_heads * head_dim]
    """

    qkv: torch.Tensor
    q: torch.Tensor
    heads: torch.Tensor
    joined: torch.Tensor


class LatentActivations(NamedTuple):
    """Of LatentAttention, [num_tokens, ...] each.

    compressed   [.., q_lora_rank + kv_lora_rank + qk_rope_head_dim]
    q            [.., num_heads, qk_nope_head_dim + qk_rope_head_dim]
    absorbed     [.., num_heads, kv_lora_rank + qk_rope_head_dim], what latents are compared with
    latents      [.., num_heads, kv_lora_rank], what comes of them
    heads        [.., num_heads, v_head_dim]
    """

    compressed: torch.Tensor
    q: torch.Tensor
    absorbed: torch.Tensor
    latents: torch.Tensor
    heads: torch.Tensor


class MLPActivations(NamedTuple):
    """Of MLP: gate_up [num_tokens, 2 n], and what the activation function makes of it, [.., n]."""

    gate_up: torch.Tensor
    activated: torch.Tensor


class ExpertsActivations(NamedTuple):
    """Of Experts; `rows` are the tokens' assignments, in the order of the experts.

    routing      which experts tokens go to
    activated    [num_tokens * top_k, size]
    rows         [num_tokens * top_k, hidden_size], what comes in and then what experts make of it
    shared       of the shared expert
    shared_out   [num_tokens, hidden_size], what that makes
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
    """Of a decoder, [num_tokens, hidden_size] each but where said.

    hidden     what a block reads; at the end, the hidden states after the last norm. It lies at the
               beginning of the arena, whatever the number of tokens.
    residual   the residual stream
    output     of a block that does not add to the residual itself; empty where all do
    squares    what makes a norm a factor: float32 [num_tokens, num_squares(hidden_size)], of few
               tokens; None where norms are calls of their own
    layers     of each layer: one memory for all, and for a layer's attention and its MLP
    shrunk     what adapters make of a Linear's input, as AdapterRows has it; empty without slots
    """

    hidden: torch.Tensor
    residual: torch.Tensor
    output: torch.Tensor
    squares: torch.Tensor | None
    layers: list[LayerActivations]
    shrunk: Mapping[int, torch.Tensor]
