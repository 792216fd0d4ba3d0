"""Products with quantised matrices: 4-bit integers (w4a16.py) and 8-bit floats (fp8.py).

With few rows of x, a kernel multiplies by the quantised matrix directly. With more rows there are
two ways. The matrix is dequantised first, slice by slice, into `scratch`: a tensor of one dimension
and x's dtype with room for at least matrix.row_step rows. Or, on a card with FP8 matrix units, x is
rounded to 8 bits and multiplied by the FP8 matrix.
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

# The most rows for which a norm may be fused into quantised linears, by scheme: those of one pass
# of the kernel for few rows. With more, another kernel, which fuses no norms, is faster than two
# passes.
MAX_NORM_ROWS = {"w4a16": 16, "fp8": 8}

_served: dict[tuple[object, ...], bool] = {}  # cached answers of serves_linear_w4a16, _fp8, _w8a8


class Matrix(Protocol):
    """A quantised matrix W [n, k], or a stack of the matrices of all experts, [count, n, k]."""

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, /,
                 *norm: Any) -> None:  # fmt: skip
        """The kernel for few rows: x W^T + bias [m, n], then the epilogue -> out.

        epilogue  ops.STORE, ADD (to out, the residual) or SILU_MUL.
        norm      x_squares, eps, norm_weight, scaled, squares: for fused norms, as in
                  ops.linear_of_scaled and linear_add_for_norm.
        """

    def multiply_grouped(
        self, x: Tensor, order: Tensor | None, offsets: Tensor, max_group: int,
        sorted_x: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """The kernel of a mixture of experts; on a CPU for few rows of each expert.

        Without `order` as ops.experts.grouped_linear, with it as grouped_linear_silu_mul, of which
        sorted_x is the scratch memory.

        max_group  an upper bound of the number of rows of an expert.
        """

    def of_expert(self, index: int) -> Matrix:
        """The matrix of one expert of a stack, as views."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored matrix with its scales."""

    def is_own(self, x: Tensor) -> bool:
        """Whether `multiply` is the fastest way for x's number of rows."""

    def multiply_rounded(
        self, x: Tensor, bias: Tensor | None, out: Tensor, epilogue: int, scratch: Tensor
    ) -> bool:
        """`multiply` with x rounded to 8 bits, if that is faster than dequantising W.

        Returns whether it was done; if not, `out` is unchanged. With SILU_MUL, the rows of the gate
        are a multiple of fp8.HALF_TILE_ROWS.
        """

    @property
    def row_step(self) -> int:
        """Slices that are dequantised begin at a multiple of so many rows."""

    def dequantise(self, begin: int, out: Tensor) -> None:
        """Dequantise the rows from `begin` on, a multiple of row_step -> out [rows, k].

        Each element is rounded once; rows of out may be strided.
        """


class W4A16Matrix(NamedTuple):
    """`packed` is laid out as in w4a16.py: int32 [num_strips, num_units, unit_words]; a stack of
    experts has a leading dimension [count]."""

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
    """weight uint8 [n, k] and scales float32, laid out as in fp8.py; a stack of experts has a
    leading dimension [count]."""

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
        """Whether multiply_rounded is the fastest way for x's number of rows."""
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
    """An Fp8Matrix whose activations are never rounded to 8 bits."""

    def is_rounding(self, x: Tensor) -> bool:
        return False


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, scratch: Tensor) -> None:
    """x W^T + bias -> out [m, n]. x [m, k], rows may be strided; bias [n]; scratch as above."""
    if matrix.is_own(x):
        matrix.multiply(x, bias, out, STORE)
        return
    if matrix.multiply_rounded(x, bias, out, STORE, scratch):
        return
    for begin, end, weight in _slices(matrix, out.shape[1], x.shape[1], scratch):
        part = None if bias is None else bias[begin:end]
        # On a card our own kernels prefetch their weight before the kernel launched before them has
        # ended. Here that kernel writes the weight, so torch's product is used.
        if x.is_cuda:
            functional.linear(x, weight, part, out=out[:, begin:end])  # type: ignore[call-arg]
        else:
            ops.linear(x, weight, part, out[:, begin:end])


def linear_add(
    x: Tensor, matrix: Matrix, bias: Tensor | None, residual: Tensor, scratch: Tensor
) -> None:
    """As ops.linear_add, with a quantised matrix."""
    if matrix.is_own(x):
        matrix.multiply(x, bias, residual, ADD)
        return
    if matrix.multiply_rounded(x, bias, residual, ADD, scratch):
        return
    for begin, end, weight in _slices(matrix, residual.shape[1], x.shape[1], scratch):
        part, to = None if bias is None else bias[begin:end], residual[:, begin:end]
        if x.is_cuda:  # as in `linear`
            if part is not None:
                to += part
            to.addmm_(x, weight.t())
        else:
            ops.linear_add(x, weight, part, to)


def linear_silu_mul(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, gate_up: Tensor, scratch: Tensor
) -> None:
    """As ops.linear_silu_mul, with a quantised matrix of 2 n rows."""
    has_whole_strips = out.shape[1] % w4a16.STRIP_ROWS == 0  # no strip has rows of gate and up
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
    """As ops.linear_add_for_norm, with a quantised matrix."""
    matrix.multiply(x, bias, residual, ADD, None, 0.0, norm_weight, scaled, squares)


def linear_of_scaled(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """As ops.linear_of_scaled, with a quantised matrix."""
    matrix.multiply(x, bias, out, STORE, x_squares, eps)


def linear_silu_mul_of_scaled(
    x: Tensor, matrix: Matrix, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """As ops.linear_silu_mul_of_scaled, with a quantised matrix of 2 n rows; on a card n must be a
    multiple of 16."""
    matrix.multiply(x, bias, out, SILU_MUL, x_squares, eps)


def grouped_linear_silu_mul(
    x: Tensor, matrix: Matrix, routing: Routing, out: Tensor, sorted_x: Tensor, scratch: Tensor
) -> None:
    """As ops.experts.grouped_linear_silu_mul, with quantised matrices of 2 n rows each."""
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
    """As ops.experts.grouped_linear, with quantised matrices."""
    if x.is_cuda or matrix.is_own(x[: longest_group(routing)]):
        num_tokens = len(routing.places)
        matrix.multiply_grouped(x, None, routing.offsets, num_tokens, None, out)
        return
    for expert, begin, end in chunks(routing):
        linear(x[begin:end], matrix.of_expert(expert), None, out[begin:end], scratch)


def first_rounded_row(device: torch.device) -> int | None:
    """The smallest number of rows for which x is rounded to 8 bits before it is multiplied by an
    FP8 matrix on this device; None: never."""
    if device.type != "cuda":
        return None
    block = torch.zeros(128, 128, dtype=torch.uint8, device=device)
    served = (m for m in range(1, 2049) if _ops.serves_linear_w8a8(block, m, 128, 128))
    return next(served, None)


def dequantise(matrix: Matrix, out: Tensor) -> None:
    """Dequantise W, rounding each element once -> out [n, k]; rows of out may be strided."""
    matrix.dequantise(0, out)


def scratch_rows(matrix: Matrix, n: int, k: int, num_elements: int) -> int:
    """The number of rows of a matrix [n, k] that are dequantised at once in a scratch of
    num_elements elements: a multiple of row_step, and at least one row_step."""
    step = matrix.row_step
    return min(-(-n // step), max(1, num_elements // (k * step))) * step


def _slices(matrix: Matrix, n: int, k: int, scratch: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Dequantise a matrix [n, k] slice by slice: yields (first row, end, weight), where weight
    [end - first, k] is a view of `scratch` that the next slice overwrites."""
    num_rows = scratch_rows(matrix, n, k, len(scratch))
    for begin in range(0, n, num_rows):
        end = min(n, begin + num_rows)
        weight = scratch[: (end - begin) * k].view(end - begin, k)
        matrix.dequantise(begin, weight)
        yield begin, end, weight
