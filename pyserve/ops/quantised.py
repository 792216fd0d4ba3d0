"""Typed wrappers of the ops on matrices of 4-bit integers, as they lie by w4a16.py: as in ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pyserve import ops
from pyserve.ops import ADD, SILU_MUL, STORE, w4a16
from pyserve.ops.native import native as _ops

_served: dict[
    tuple[int, torch.dtype, torch.Size | None], bool
] = {}  # what serves_linear_w4a16 said


def _is_own_w4a16(x: Tensor, packed: Tensor) -> bool:
    """Whether the kernels of the integers are faster than to make plain numbers of them first."""
    key = x.shape[0], x.dtype, packed.shape if x.is_cuda else None
    is_served = _served.get(key)
    if is_served is None:
        is_served = _served[key] = _ops.serves_linear_w4a16(x, packed)
    return is_served


def _plain_slices(
    packed: Tensor, n: int, k: int, scratch: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """(first, end, plain numbers) of rows of a matrix [n, k], in scratch, one after the other."""
    num_strips = len(scratch) // (k * w4a16.STRIP_ROWS)
    for strip in range(0, len(packed), num_strips):
        begin, strips = strip * w4a16.STRIP_ROWS, packed[strip : strip + num_strips]
        end = min(n, begin + len(strips) * w4a16.STRIP_ROWS)
        weight = scratch[: (end - begin) * k].view(end - begin, k)
        dequantise_w4a16(strips, weight)
        yield begin, end, weight


def linear_w4a16(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, scratch: Tensor
) -> None:
    """x W^T + bias -> out [m, n] of a matrix W [n, k] of 4-bit integers, `packed` as w4a16.py says.

    x [m, k], rows may be strided; bias [n]. For many rows W is made plain numbers first, and
    multiplied as `ops.linear` does: so many rows of it at a time, at least 16, as fit in `scratch`,
    of x's dtype and one dimension.
    """
    if _is_own_w4a16(x, packed):
        _ops.linear_w4a16(x, packed, bias, out)
        return
    for begin, end, weight in _plain_slices(packed, out.shape[1], x.shape[1], scratch):
        part = None if bias is None else bias[begin:end]
        if x.is_cuda:  # our kernels read a weight before the one in front, which writes this, ends
            functional.linear(x, weight, part, out=out[:, begin:end])  # type: ignore[call-arg]
        else:
            ops.linear(x, weight, part, out[:, begin:end])


def linear_add_w4a16(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, scratch: Tensor
) -> None:
    """ops.linear_add of the matrix of linear_w4a16."""
    if _is_own_w4a16(x, packed):
        _ops.linear_w4a16(x, packed, bias, residual, ADD)
        return
    for begin, end, weight in _plain_slices(packed, residual.shape[1], x.shape[1], scratch):
        part, to = None if bias is None else bias[begin:end], residual[:, begin:end]
        if x.is_cuda:  # as above
            if part is not None:
                to += part
            to.addmm_(x, weight.t())
        else:
            ops.linear_add(x, weight, part, to)


def linear_silu_mul_w4a16(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, gate_up: Tensor, scratch: Tensor
) -> None:
    """ops.linear_silu_mul of the matrix of linear_w4a16, of 2 n rows."""
    has_whole_strips = out.shape[1] % w4a16.STRIP_ROWS == 0  # else a strip would be of both halves
    if has_whole_strips and _is_own_w4a16(x, packed):
        _ops.linear_w4a16(x, packed, bias, out, SILU_MUL)
    else:
        linear_w4a16(x, packed, bias, gate_up, scratch)
        ops.silu_mul(gate_up, out)


# Rows up to which a norm may be a factor between linears of 4-bit integers: those of one pass of
# the kernel for few rows. The kernel for more has no norms, and is faster without than two passes.
MAX_NORM_ROWS = 16


def linear_add_w4a16_for_norm(
    x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor,
    scaled: Tensor, squares: Tensor,
) -> None:  # fmt: skip
    """ops.linear_add_for_norm of the matrix of linear_w4a16."""
    _ops.linear_w4a16(
        x, packed, bias, residual, ADD, None, 0.0, norm_weight, scaled, squares
    )  # fmt: skip


def linear_w4a16_of_scaled(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """ops.linear_of_scaled of the matrix of linear_w4a16."""
    _ops.linear_w4a16(x, packed, bias, out, STORE, x_squares, eps)


def linear_silu_mul_w4a16_of_scaled(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """ops.linear_silu_mul_of_scaled of the matrix of linear_w4a16; n a multiple of 16 on a card."""
    _ops.linear_w4a16(x, packed, bias, out, SILU_MUL, x_squares, eps)


def dequantise_w4a16(packed: Tensor, out: Tensor) -> None:
    """W as plain numbers, each rounded once -> out [n, k]; rows may be strided."""
    _ops.dequantise_w4a16(packed, out)
