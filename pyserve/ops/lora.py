"""Typed wrappers of the ops that add LoRA adapters to a linear's output (Hu et al. 2021).

A linear may fuse `num_parts` modules of the checkpoint (q, k and v; gate and up). For each part an
adapter has a pair of matrices: y[part] += scale * (x A^T) B^T. The pairs are in `num_slots` slots
of tensors that never move, with room for max_rank:

    a       [num_slots, num_parts, max_rank, k], of x's dtype, as b
    b       [num_slots, n, max_rank]: the rows of all parts, in the order of the linear's outputs
    ranks   int32 [num_slots, num_parts]: how much of max_rank a pair uses; 0 for no pair. What is
            stored beyond a pair's rank has no effect
    scales  float32 [num_slots, num_parts]

The tokens of a step are sorted by slot, those without an adapter first: tokens [starts[s],
starts[s + 1]) use slot s, where starts is int32 [num_slots + 1]. Outputs of all other tokens,
padding included, are not changed. If starts, ranks or columns are out of range, the ops raise
RuntimeError on a CPU and trap on a card. The plain-torch specification is in reference_lora.py.

The intermediate x A^T is float32 [num_splits, num_tokens, num_parts, max_rank], to be summed over
the splits. On a card each split covers some of the columns of x, so that more multiprocessors share
the reading of A.

For few tokens on a card the linear's own kernel can add the second product: linear_lora.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyserve.ops.native import native

# Splits on a card. With 4,096 columns each of 8 splits has 512, which is two loads for each lane.
# With many tokens a CTA takes 64 of them, so splits * tokens = 8,192 makes 128 CTAs, about one for
# each SM of an H200.
MAX_SPLITS, SPLIT_ROWS = 8, 8192
# Up to FEW_TOKENS there are more splits, so that each warp loads its part of 14,336 columns at
# once. More tokens may use so many adapters that the CTAs would no longer run all at a time.
FEW_TOKENS, FEW_SPLITS = 2, 16


def num_splits(num_tokens: int, device: torch.device) -> int:
    """The number of splits for a step of num_tokens tokens on this device."""
    if device.type != "cuda":
        return 1
    if num_tokens <= FEW_TOKENS:
        return FEW_SPLITS
    return max(1, min(MAX_SPLITS, SPLIT_ROWS // num_tokens))


def most_rows(max_num_tokens: int) -> int:
    """The maximum of num_splits * num_tokens on any device, for up to max_num_tokens tokens."""
    of_few = FEW_SPLITS * min(max_num_tokens, FEW_TOKENS)
    return max(max_num_tokens, of_few, min(MAX_SPLITS * max_num_tokens, SPLIT_ROWS))


def lora_shrink(
    x: Tensor, a: Tensor, starts: Tensor, ranks: Tensor, scales: Tensor, out: Tensor,
    x_squares: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """scale * x A^T -> out, float32 [num_splits, num_tokens, num_parts, max_rank]; elements beyond
    a part's rank are undefined.

    x [num_tokens, k]; rows of x and of out may be strided. With x_squares a norm is fused in, as in
    ops.linear_of_scaled.
    """
    native.lora_shrink(x, a, starts, ranks, scales, out, x_squares, eps)


def lora_expand(
    shrunk: Tensor, b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, out: Tensor
) -> None:
    """out [num_tokens, n] += shrunk B^T in place, rounded once.

    shrunk is lora_shrink's out. columns int32 [num_parts + 1]: part p has the columns
    [columns[p], columns[p + 1]) of out.
    """
    native.lora_expand(shrunk, b, starts, ranks, columns, out)


def lora_expand_silu_mul(
    shrunk: Tensor, b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, gate_up: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """silu(gate) * up of gate_up [num_tokens, 2 n] + shrunk B^T -> out [num_tokens, n].

    Computed for all tokens, also those without an adapter. gate and up may be two parts or one. On
    a CPU gate_up is overwritten with the sum, which is rounded before the activation; on a card
    there is only one rounding.
    """
    native.lora_expand_silu_mul(shrunk, b, starts, ranks, columns, gate_up, out)


# The most rows that linear_lora serves on any card.
MAX_LINEAR_ROWS = 8


class LinearLora(NamedTuple):
    """What adapters add to a linear: `shrunk`, of rows of x without a norm's factor, and the other
    arguments of lora_expand."""

    shrunk: Tensor
    b: Tensor
    starts: Tensor
    ranks: Tensor
    columns: Tensor


def serves_linear_lora(
    x: Tensor, weight: Tensor, out: Tensor, epilogue: int, adapters: LinearLora
) -> bool:
    """Whether linear_lora serves these. On a card: cuda/gpu/linear/few_rows_lora.cu."""
    if not x.is_cuda or len(x) > MAX_LINEAR_ROWS:
        return False
    is_served: bool = native.serves_linear_lora(x, weight, out, epilogue, *adapters)
    return is_served


def linear_lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, epilogue: int,
    adapters: LinearLora, x_squares: Tensor | None = None, eps: float = 0.0,
    norm_weight: Tensor | None = None, scaled: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:  # fmt: skip
    """A linear with its adapters in one kernel, rounded once; requires serves_linear_lora.

    weight is that of ops.linear, or `packed` as w4a16.py defines it. epilogue is STORE, ADD or
    SILU_MUL, and the arguments of norms are those of ops.linear_of_scaled and linear_add_for_norm.
    The factor of a norm in front multiplies what the adapters add, too.
    """
    native.linear_lora(
        x, weight, bias, out, epilogue, *adapters, x_squares, eps, norm_weight, scaled, squares
    )
