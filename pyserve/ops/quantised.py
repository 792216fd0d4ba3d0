"""Products with matrices that are stored in a way of their own: 4-bit integers (w4a16.py), 8-bit
floats (fp8.py).

For few rows of x there are kernels that read what is stored; for more it is made plain numbers
first, a slice at a time, in memory that is given: `scratch`, of x's dtype and one dimension, holds
matrix.row_step rows at least. Or x is rounded to what a card's matrix units multiply, there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from pyserve import ops
from pyserve.ops import ADD, SILU_MUL, STORE, fp8, w4a16
from pyserve.ops.experts import CHUNK_ROWS, Routing, chunks, longest_group, sort_rows
from pyserve.ops.native import native as _ops

# Rows up to which a norm may be a factor between linears of 4-bit integers: those of one pass of
# the kernel for few rows. The kernel for more has no norms, and is faster without than two passes.
MAX_NORM_ROWS = 16

_served: dict[tuple[object, ...], bool] = {}  # what serves_linear_w4a16, _fp8 and _w8a8 said


class Matrix(Protocol):
    """W [n, k], or of all experts [count, n, k]."""

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, /,
                 *norm: Any) -> None:  # fmt: skip
        """The kernel for few rows: x W^T + bias [m, n], and what the epilogue makes of it -> out.

        norm   x_squares, eps, norm_weight, scaled, squares, as ops.linear_of_scaled and
               linear_add_for_norm have them.
        """

    def multiply_grouped(
        self, x: Tensor, order: Tensor | None, offsets: Tensor, max_group: int,
        sorted_x: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """The kernel for few rows of each expert, on a card for any: as ops.experts.grouped_linear;
        with an order as grouped_linear_silu_mul, and sorted_x is room as it has there."""

    def of_expert(self, index: int) -> Matrix: ...

    @property
    def nbytes(self) -> int: ...

    def is_own(self, x: Tensor) -> bool:
        """Whether `multiply` is faster for these rows than to make plain numbers first."""

    def multiply_rounded(
        self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, scratch: Tensor
    ) -> bool:
        """multiply of x rounded, where that is faster than plain numbers: whether it was done. The
        rows of a gate are a multiple of fp8.HALF_TILE_ROWS."""

    @property
    def row_step(self) -> int:
        """Of slices of plain numbers."""

    def dequantise(self, begin: int, out: Tensor) -> None:
        """Rows from `begin` on, a multiple of row_step, as plain numbers, each rounded once
        -> out [rows, k]; rows may be strided."""


class W4A16Matrix(NamedTuple):
    """`packed` as w4a16.py says: int32 [strips, units, words], behind [count] of experts."""

    packed: Tensor

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, /,
                 *norm: Any) -> None:  # fmt: skip
        _ops.linear_w4a16(x, self.packed, bias, out, epilogue, *norm)

    def multiply_grouped(
        self, x: Tensor, order: Tensor | None, offsets: Tensor, max_group: int,
        sorted_x: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        _ops.grouped_linear_w4a16(x, self.packed, order, offsets, max_group, sorted_x, out)

    def of_expert(self, index: int) -> W4A16Matrix:
        return W4A16Matrix(self.packed[index])

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def is_own(self, x: Tensor) -> bool:
        key = "w4a16", x.shape, x.dtype, self.packed.shape if x.is_cuda else None
        is_served = _served.get(key)
        if is_served is None:
            is_served = _served[key] = _ops.serves_linear_w4a16(x, self.packed)
        return is_served

    def multiply_rounded(
        self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, scratch: Tensor
    ) -> bool:
        return False

    @property
    def row_step(self) -> int:
        return w4a16.STRIP_ROWS

    def dequantise(self, begin: int, out: Tensor) -> None:
        strip = begin // w4a16.STRIP_ROWS
        _ops.dequantise_w4a16(self.packed[strip : -(-(begin + len(out)) // w4a16.STRIP_ROWS)], out)


class Fp8Matrix(NamedTuple):
    """As fp8.py says: weight uint8, scales float32."""

    weight: Tensor
    scales: Tensor
    scale_rows: int
    scale_columns: int

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, /,
                 *norm: Any) -> None:  # fmt: skip
        _ops.linear_fp8(x, *self, bias, out, epilogue, *norm)

    def multiply_grouped(
        self, x: Tensor, order: Tensor | None, offsets: Tensor, max_group: int,
        sorted_x: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        _ops.grouped_linear_fp8(x, *self, order, offsets, max_group, out)

    def of_expert(self, index: int) -> Fp8Matrix:
        return self._replace(weight=self.weight[index], scales=self.scales[index])

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def is_own(self, x: Tensor) -> bool:
        scale = self.scale_rows, self.scale_columns
        shape = (self.weight.shape, *scale) if x.is_cuda else None
        key = type(self), x.shape[0], x.dtype, shape
        is_served = _served.get(key)
        if is_served is None:
            is_served = _ops.serves_linear_fp8(x, self.weight) and not self.is_rounding(x)
            _served[key] = is_served
        return is_served

    def is_rounding(self, x: Tensor) -> bool:
        if not x.is_cuda:
            return False
        scale = self.scale_rows, self.scale_columns
        key = "w8a8", x.shape[0], self.weight.shape, scale
        is_served = _served.get(key)
        if is_served is None:
            is_served = _served[key] = _ops.serves_linear_w8a8(self.weight, x.shape[0], *scale)
        return is_served

    def multiply_rounded(
        self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, scratch: Tensor
    ) -> bool:
        is_done = self.is_rounding(x)
        if is_done:
            _ops.linear_w8a8(x, *self, bias, out, scratch, epilogue)
        return is_done

    @property
    def row_step(self) -> int:
        return self.scale_rows

    def dequantise(self, begin: int, out: Tensor) -> None:
        end = begin + len(out)
        scales = self.scales[begin // self.scale_rows : -(-end // self.scale_rows)]
        weight = self.weight[begin:end]
        _ops.dequantise_fp8(weight, scales, self.scale_rows, self.scale_columns, out)


class Fp8WeightMatrix(Fp8Matrix):
    """By activations that are never rounded."""

    def is_rounding(self, x: Tensor) -> bool:
        return False


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, scratch: Tensor) -> None:
    """x W^T + bias -> out [m, n]. x [m, k], rows may be strided; bias [n]."""
    if matrix.is_own(x):
        matrix.multiply(x, bias, out, STORE)
        return
    if matrix.multiply_rounded(x, bias, out, STORE, scratch):
        return
    for begin, end, weight in _slices(matrix, out.shape[1], x.shape[1], scratch):
        part = None if bias is None else bias[begin:end]
        if x.is_cuda:  # our kernels read a weight before the one in front, which writes this, ends
            functional.linear(x, weight, part, out=out[:, begin:end])  # type: ignore[call-arg]
        else:
            ops.linear(x, weight, part, out[:, begin:end])


def linear_add(
    x: Tensor, matrix: Matrix, bias: Tensor | None, residual: Tensor, scratch: Tensor
) -> None:
    """ops.linear_add of the matrix."""
    if matrix.is_own(x):
        matrix.multiply(x, bias, residual, ADD)
        return
    if matrix.multiply_rounded(x, bias, residual, ADD, scratch):
        return
    for begin, end, weight in _slices(matrix, residual.shape[1], x.shape[1], scratch):
        part, to = None if bias is None else bias[begin:end], residual[:, begin:end]
        if x.is_cuda:  # as above
            if part is not None:
                to += part
            to.addmm_(x, weight.t())
        else:
            ops.linear_add(x, weight, part, to)


def linear_silu_mul(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, gate_up: Tensor, scratch: Tensor
) -> None:
    """ops.linear_silu_mul of the matrix, of 2 n rows."""
    has_whole_strips = out.shape[1] % w4a16.STRIP_ROWS == 0  # else a strip would be of both halves
    if has_whole_strips and matrix.is_own(x):
        matrix.multiply(x, bias, out, SILU_MUL)
        return
    has_whole_tiles = out.shape[1] % fp8.HALF_TILE_ROWS == 0
    if has_whole_tiles and matrix.multiply_rounded(x, bias, out, SILU_MUL, scratch):
        return
    linear(x, matrix, bias, gate_up, scratch)
    ops.silu_mul(gate_up, out)


def linear_add_for_norm(
    x: Tensor, matrix: Matrix, bias: Tensor | None, residual: Tensor, norm_weight: Tensor,
    scaled: Tensor, squares: Tensor,
) -> None:  # fmt: skip
    """ops.linear_add_for_norm of the matrix."""
    matrix.multiply(x, bias, residual, ADD, None, 0.0, norm_weight, scaled, squares)


def linear_of_scaled(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """ops.linear_of_scaled of the matrix."""
    matrix.multiply(x, bias, out, STORE, x_squares, eps)


def linear_silu_mul_of_scaled(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """ops.linear_silu_mul_of_scaled of the matrix; n a multiple of 16 on a card."""
    matrix.multiply(x, bias, out, SILU_MUL, x_squares, eps)


def grouped_linear_silu_mul(
    x: Tensor, matrix: Matrix, routing: Routing, out: Tensor, sorted_x: Tensor, scratch: Tensor
) -> None:
    """ops.experts.grouped_linear_silu_mul of the matrices, each of 2 n rows."""
    if x.is_cuda or matrix.is_own(sorted_x[: longest_group(routing)]):
        num_tokens = len(x)  # no expert has more rows
        matrix.multiply_grouped(x, routing.order, routing.offsets, num_tokens, sorted_x, out)
        return
    sort_rows(x, routing, sorted_x)
    gate_up = x.new_empty(CHUNK_ROWS, 2 * out.shape[1])
    for expert, begin, end in chunks(routing):
        linear_silu_mul(
            sorted_x[begin:end], matrix.of_expert(expert), None, out[begin:end],
            gate_up[: end - begin], scratch,
        )  # fmt: skip


def grouped_linear(
    x: Tensor, matrix: Matrix, routing: Routing, out: Tensor, scratch: Tensor
) -> None:
    """ops.experts.grouped_linear of the matrices."""
    if x.is_cuda or matrix.is_own(x[: longest_group(routing)]):
        num_tokens = len(routing.places)
        matrix.multiply_grouped(x, None, routing.offsets, num_tokens, None, out)
        return
    for expert, begin, end in chunks(routing):
        linear(x[begin:end], matrix.of_expert(expert), None, out[begin:end], scratch)


def first_rounded_row(device: torch.device) -> int | None:
    """Rows of x from which a matrix of 8-bit floats is multiplied by x rounded, on this device."""
    if device.type != "cuda":
        return None
    block = torch.zeros(128, 128, dtype=torch.uint8, device=device)
    served = (m for m in range(1, 2049) if _ops.serves_linear_w8a8(block, m, 128, 128))
    return next(served, None)


def dequantise(matrix: Matrix, out: Tensor) -> None:
    """W as plain numbers, each rounded once -> out [n, k]; rows may be strided."""
    matrix.dequantise(0, out)


def scratch_rows(matrix: Matrix, n: int, k: int, num_elements: int) -> int:
    """Of a matrix [n, k] that are made plain numbers at once in so much memory: whole steps."""
    step = matrix.row_step
    return min(-(-n // step), max(1, num_elements // (k * step))) * step


def _slices(matrix: Matrix, n: int, k: int, scratch: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first, end, plain numbers) of rows of a matrix [n, k], in scratch, one after the other."""
    num_rows = scratch_rows(matrix, n, k, len(scratch))
    for begin in range(0, n, num_rows):
        end = min(n, begin + num_rows)
        weight = scratch[: (end - begin) * k].view(end - begin, k)
        matrix.dequantise(begin, weight)
        yield begin, end, weight
