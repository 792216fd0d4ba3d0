"""Typed wrappers of the ops that add adapters to a linear's output (LoRA, Hu et al. 2021).

A linear of `num_parts` modules of the checkpoint (q, k and v; gate and up) has, of each adapter, a
pair of matrices a part: y[part] += scale * (x A^T) B^T. They lie in `num_slots` slots of tensors
that never move and have room for max_rank:

    a       [num_slots, num_parts, max_rank, k], of x's dtype as b
    b       [num_slots, n, max_rank]: the rows of all parts, as the linear's columns
    ranks   int32 [num_slots, num_parts]: what of max_rank is used, 0 where a part has no pair; what
            lies behind is never read
    scales  float32 [num_slots, num_parts]

The tokens of a step stand sorted by slot, those without an adapter first: starts int32
[num_slots + 1] says that [starts[s], starts[s + 1]) are slot s's. Others, padding among them, are
left as they are. On a CPU both raise RuntimeError where starts, ranks or columns are out of range,
on a card they trap. The plain-torch meaning is in reference_lora.py.
"""

from __future__ import annotations

from torch import Tensor

from pyserve.ops.native import native


def lora_shrink(
    x: Tensor, a: Tensor, starts: Tensor, ranks: Tensor, scales: Tensor, out: Tensor
) -> None:
    """scale * x A^T -> out, float32 [num_tokens, num_parts, max_rank], up to each part's rank.

    x [num_tokens, k], rows may be strided, as may those of out.
    """
    native.lora_shrink(x, a, starts, ranks, scales, out)


def lora_expand(
    shrunk: Tensor, b: Tensor, starts: Tensor, ranks: Tensor, columns: Tensor, out: Tensor
) -> None:
    """out [num_tokens, n] += shrunk B^T in place, rounded once.

    shrunk is lora_shrink's out; columns int32 [num_parts + 1]: where each part's begin in out.
    """
    native.lora_expand(shrunk, b, starts, ranks, columns, out)
