"""FP8: a matrix of 8-bit floats (e4m3) with scales: its layout in memory, which is the same for all
kernels, and plain-torch code that writes and reads it.

A matrix W [n, k] is `weight` uint8 [n, k], the bits of float8_e4m3fn as the checkpoint has them,
and `scales` float32 [n / scale_rows, k / scale_columns], each rounded up:

    W[r, c] = e4m3(weight[r, c]) * scales[r / scale_rows, c / scale_columns]

With a scale for each block of 128 by 128, scale_rows and scale_columns are 128; with a scale for
each row, they are 1 and k. scale_columns is a multiple of 64 (on a card, of 128), or k. If modules
are fused into a matrix and do not all begin at a multiple of 128 rows, scale_rows is the greatest
common divisor of 128 and their first rows. The NaNs 0x7f and 0xff stay NaN on a CPU; products on a
card treat them as 480.

Activations are 16-bit. With many rows, on a card with FP8 matrix units, linear_w8a8 may round them
to 8 bits, with a scale for each token and group of 128 columns; the last group of a row may be
shorter. Checkpoints with block scales are made for that; for row scales it is finer than needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 448.0  # the largest e4m3
BLOCK_COLUMNS = 64  # scale_columns is a multiple of this, or k
GROUP_COLUMNS = 128  # columns of activations that share a scale in linear_w8a8
HALF_TILE_ROWS = 64  # a tile of linear_w8a8 has so many rows of gate and as many of up
E4M3 = torch.float8_e4m3fn


def dequantised(weight: Tensor, scales: Tensor, scale_rows: int, scale_columns: int) -> Tensor:
    """The matrix as float32 [n, k], or a stack of matrices [count, n, k]; each element is rounded
    once, in the product."""
    n, k = weight.shape[-2:]
    rows = torch.arange(n, device=weight.device) // scale_rows
    columns = torch.arange(k, device=weight.device) // scale_columns
    return weight.view(E4M3).float() * scales[..., rows[:, None], columns]


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight [n, k] to e4m3 with a scale for each row: returns E4M3 [n, k] and the scales,
    float32 [n]. The largest magnitude of a row becomes 448."""
    weight = weight.float()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    scales = torch.where(largest > 0, largest / MAX, 1.0)
    return (weight / scales[:, None]).clamp(-MAX, MAX).to(E4M3), scales


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [m, k] as linear_w8a8 does: returns uint8 [m, k] and the scales, float32 [groups, m].

    The largest magnitude of a group becomes 448, but is taken for at least 2^-100.
    """
    m, k = x.shape
    groups = torch.nn.functional.pad(x.float(), (0, -k % GROUP_COLUMNS)).view(m, -1, GROUP_COLUMNS)
    largest = groups.abs().amax(2, keepdim=True).clamp(min=2**-100)
    most = torch.full_like(largest, MAX)  # a tensor: with a scalar, torch may round differently
    rounded = (groups * (most / largest)).clamp(-MAX, MAX).to(E4M3)
    scales = (largest / most).squeeze(2).T.contiguous()
    return rounded.view(torch.uint8).view(m, -1)[:, :k].contiguous(), scales


def fill_with_noise(weight: Tensor, generator: torch.Generator | None) -> float:
    """Fill `weight`, E4M3 [.., k], with noise of standard deviation 64; returns the scale, 1 / 64,
    that makes it 1. In pieces of float32, because torch draws no 8-bit numbers on a card.
    """
    flat = weight.view(-1, weight.shape[-1])
    for begin in range(0, len(flat), 4096):
        rows = flat[begin : begin + 4096]
        noise = torch.empty(rows.shape, device=rows.device).normal_(0, 64, generator=generator)
        rows.copy_(noise.clamp_(-MAX, MAX))
    return 1 / 64
