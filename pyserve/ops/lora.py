"""Typed wrappers of the ops that add adapters to a linear's output (LoRA, Hu et al. 2021).

A linear of `num_parts` modules of the checkpoint (q, k and v; gate and up) has, of each adapter, a
pair of matrices a part: y[part] += scale * (x A^T) B^T. They lie in `num_slots` slots of tensors
that never move and have room for max_rank:

    a       [num_slots, num_parts, max_rank, k], of x's dtype as b
    b       [num_slots, n, max_rank]: the rows of all parts, as the linear's columns
    ranks   int32 [num_slots, num_parts]: what of max_rank is used, 0 where a part has no pair; what
            lies behind counts for nothing
    scales  float32 [num_slots, num_parts]

The tokens of a step stand sorted by slot, those without an adapter first: starts int32
[num_slots + 1] says that [starts[s], starts[s + 1]) are slot s's. Others, padding among them, are
left as they are. On a CPU all raise RuntimeError where starts, ranks or columns are out of range,
on a card they trap. The plain-torch meaning is in reference_lora.py.

What is between the two products is float32 [num_splits, num_tokens, num_parts, max_rank], of which
the sum over splits counts: on a card each is of some columns of x, so that more of it reads A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyserve.ops.native import native

# Splits on a card. One user's x of 4,096 columns is 512 each, two loads of a lane. Many tokens are
# taken by CTAs of 64: 8,192 of them, times splits, give 128 of an H200's SMs one each.
MAX_SPLITS, SPLIT_ROWS = 8, 8192


def num_splits(num_tokens: int, device: torch.device) -> int:
    """For so many tokens."""
    if device.type != "cuda":
        return 1
    return max(1, min(MAX_SPLITS, SPLIT_ROWS // max(num_tokens, 1)))


def most_rows(max_num_tokens: int) -> int:
    """What splits times tokens are at most on any device, of any number of tokens up to that."""
    return max(max_num_tokens, min(MAX_SPLITS * max_num_tokens, SPLIT_ROWS))


def lora_shrink(
    x: Tensor, a: Tensor, starts: Tensor, ranks: Tensor, scales: Tensor, out: Tensor,
    x_squares: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """scale * x A^T -> out, float32 [num_splits, num_tokens, num_parts, max_rank], up to each
    part's rank.

    x [num_tokens, k], rows may be strided, as may those of out. With x_squares a norm is a factor
    of x, as in ops.linear_of_scaled.
    """
    native.lora_shrink(x, a, starts, ranks, scales, out, x_squares, eps)


def lora_expand(
    shrunk: Tensor, b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, out: Tensor
) -> None:
    """out [num_tokens, n] += shrunk B^T in place, rounded once.

    shrunk is lora_shrink's out; columns int32 [num_parts + 1]: where each part's begin in out.
    """
    native.lora_expand(shrunk, b, starts, ranks, columns, out)


def lora_expand_silu_mul(
    shrunk: Tensor, b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, gate_up: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """silu(gate) * up of gate_up [num_tokens, 2 n] + shrunk B^T -> out [num_tokens, n].

    Of all tokens. gate and up are a part each, or one together. gate_up may be written too: where
    it is not, as on a card, there is one rounding.
    """
    native.lora_expand_silu_mul(shrunk, b, starts, ranks, columns, gate_up, out)
