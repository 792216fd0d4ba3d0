"""Plain-torch twins of the ops between ranks, over lists: what a group of ranks must come to.

Each takes one tensor a rank, in the order of ranks, and works in place as the ranks' own ops do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyserve.ops import reference


def sum_parts(parts: Sequence[Tensor]) -> Tensor:
    """The sum in float32, from 0 on in the order of ranks, rounded once to the parts' dtype.

    So one that is zero is never negative.
    """
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)


def all_reduce(parts: Sequence[Tensor]) -> None:
    """x = the sum, of every rank: one shot and two shots have the same bits."""
    total = sum_parts(parts)
    for part in parts:
        part.copy_(total)


def all_reduce_add_norm(
    partials: Sequence[Tensor], residuals: Sequence[Tensor], weight: Tensor, eps: float,
    offset: float, outs: Sequence[Tensor],
) -> None:  # fmt: skip
    """residual += the sum, out = rms_norm(residual), of every rank; the sum is rounded before."""
    total = sum_parts(partials)
    for residual, out in zip(residuals, outs, strict=True):
        reference.add_rms_norm(total, residual, weight, eps, out, offset)


def gather_rows(parts: Sequence[Tensor], out: Tensor) -> None:
    """out [num_rows, tp_size * n] = parts [num_rows, n], side by side, on the leader."""
    out.copy_(torch.cat(list(parts), dim=1))


def broadcast_tokens(tokens: Sequence[Tensor]) -> None:
    """tokens = the leader's, of every rank."""
    for other in tokens[1:]:
        other.copy_(tokens[0])
