"""FP8: a matrix of 8-bit floats, e4m3, with scales. How it lies in memory, for every kernel on
every machine, and the plain torch that makes it and reads it.

A matrix W [n, k] is `weight` uint8 [n, k], the bits of float8_e4m3fn as the checkpoint has them,
and `scales` float32 [n / scale_rows, k / scale_columns], each rounded up:

    W[r, c] = e4m3(weight[r, c]) * scales[r / scale_rows, c / scale_columns]

A scale for each block of 128 by 128 has scale_rows and scale_columns of 128, one for each row 1 and
k. scale_columns is a multiple of 64 (of 128 on a card), or k. A NaN, 0x7f and 0xff, stays one on a
CPU; products on a card take it for 480. Where parts that stand together in a matrix do not begin
with a block, scale_rows is what divides the beginnings of all.

Activations are of 16 bits; on a card with matrix units of 8 bits they may be rounded for many rows
(linear_w8a8): each token with a scale for 128 columns, as block scales ask for and as is finer than
what scales of rows do. The last group of a row may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 448.0  # the largest e4m3
BLOCK_COLUMNS = 64  # which groups of columns do not cut
GROUP_COLUMNS = 128  # of activations, that share a scale
HALF_TILE_ROWS = 64  # of weight, which linear_w8a8 takes of a gate, and of the up beside it
E4M3 = torch.float8_e4m3fn


def dequantised(weight: Tensor, scales: Tensor, scale_rows: int, scale_columns: int) -> Tensor:
    """float32 [n, k], or of all matrices [count, n, k]; one rounding, of the product."""
    n, k = weight.shape[-2:]
    rows = torch.arange(n, device=weight.device) // scale_rows
    columns = torch.arange(k, device=weight.device) // scale_columns
    return weight.view(E4M3).float() * scales[..., rows[:, None], columns]


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight [n, k] to the nearest e4m3 of a scale a row: E4M3 [n, k] and float32 [n]. The
    largest of a row becomes 448."""
    weight = weight.float()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    scales = torch.where(largest > 0, largest / MAX, 1.0)
    return (weight / scales[:, None]).clamp(-MAX, MAX).to(E4M3), scales


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [m, k] as linear_w8a8 rounds it: uint8 [m, k], and float32 scales [groups, m]. The largest
    of a group becomes 448; what is smaller than 2^-100 counts as 0."""
    m, k = x.shape
    groups = torch.nn.functional.pad(x.float(), (0, -k % GROUP_COLUMNS)).view(m, -1, GROUP_COLUMNS)
    largest = groups.abs().amax(2, keepdim=True).clamp(min=2**-100)
    most = torch.full_like(largest, MAX)  # by a number torch divides as it likes
    rounded = (groups * (most / largest)).clamp(-MAX, MAX).to(E4M3)
    scales = (largest / most).squeeze(2).T.contiguous()
    return rounded.view(torch.uint8).view(m, -1)[:, :k].contiguous(), scales


def fill_with_noise(weight: Tensor, generator: torch.Generator | None) -> float:
    """Fill `weight`, E4M3, with what scatters by 64; returns the scale that makes it scatter by 1.

    Row by row: a card has no generator for 8 bits.
    """
    flat = weight.view(-1, weight.shape[-1])
    for begin in range(0, len(flat), 4096):
        rows = flat[begin : begin + 4096]
        noise = torch.empty(rows.shape, device=rows.device).normal_(0, 64, generator=generator)
        rows.copy_(noise.clamp_(-MAX, MAX))
    return 1 / 64
