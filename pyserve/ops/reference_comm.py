"""Plain-torch twins of the ops between ranks (peers.py): the specification of their results.

Each takes a list with one tensor for each rank, in the order of ranks, and works in place, as the
ops do on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyserve.ops import reference


def sum_parts(parts: Sequence[Tensor]) -> Tensor:
    """The float32 sum in the order of ranks, starting from 0, rounded once to the parts' dtype.

    As it starts from +0, a sum that is zero is never -0.
    """
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)


def all_reduce(parts: Sequence[Tensor]) -> None:
    """x = the sum of all ranks' x, on every rank; one shot and two shots give the same bits."""
    total = sum_parts(parts)
    for part in parts:
        part.copy_(total)


def all_reduce_add_norm(
    partials: Sequence[Tensor], residuals: Sequence[Tensor], weight: Tensor, eps: float,
    offset: float, outs: Sequence[Tensor],
) -> None:  # fmt: skip
    """residual += the rounded sum; out = rms_norm(residual), on every rank."""
    total = sum_parts(partials)
    for residual, out in zip(residuals, outs, strict=True):
        reference.add_rms_norm(total, residual, weight, eps, out, offset)


def gather_rows(parts: Sequence[Tensor], out: Tensor) -> None:
    """out [num_rows, tp_size * n] = all parts [num_rows, n] side by side, on the leader."""
    out.copy_(torch.cat(list(parts), dim=1))


def broadcast_tokens(tokens: Sequence[Tensor]) -> None:
    """tokens = those of the leader, on every rank."""
    for other in tokens[1:]:
        other.copy_(tokens[0])
