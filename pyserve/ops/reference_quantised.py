"""Plain-torch twins of the ops on quantised matrices; see reference.py."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pyserve.ops import fp8, w4a16
from pyserve.ops.reference_experts import grouped_linear, grouped_linear_silu_mul
from pyserve.ops.reference_linear import linear, linear_add, linear_silu_mul


def linear_w4a16(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, epilogue: int = 0,
    x_squares: Tensor | None = None, eps: float = 0.0, norm_weight: Tensor | None = None,
    scaled: Tensor | None = None, squares: Tensor | None = None,
) -> None:  # fmt: skip
    """`linear` with a matrix as in w4a16.py; with epilogue 1 linear_add, with 2 linear_silu_mul."""
    num_rows = out.shape[1] * (2 if epilogue == 2 else 1)
    weight = w4a16.dequantised(packed, num_rows, x.shape[1])
    _linear(x, weight, bias, out, epilogue, x_squares, eps, norm_weight, scaled, squares)


def dequantise_w4a16(packed: Tensor, out: Tensor) -> None:
    """out = the matrix, each element rounded once."""
    out.copy_(w4a16.dequantised(packed, *out.shape))


def serves_linear_w4a16(x: Tensor, packed: Tensor) -> bool:
    """As serves_linear."""
    return True


def grouped_linear_w4a16(
    x: Tensor, packed: Tensor, order: Tensor | None, offsets: Tensor, max_group: int,
    sorted_x: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """grouped_linear with these matrices; if order is given, grouped_linear_silu_mul."""
    num_rows = out.shape[1] * (1 if order is None else 2)
    flat = w4a16.dequantised(packed.flatten(0, 1), packed.shape[1] * 16 * len(packed), x.shape[1])
    weight = flat.view(len(packed), packed.shape[1] * 16, -1)[:, :num_rows]
    _grouped(x, weight, order, offsets, max_group, out)


def linear_fp8(
    x: Tensor, weight: Tensor, scales: Tensor, scale_rows: int, scale_columns: int,
    bias: Tensor | None, out: Tensor, epilogue: int = 0, x_squares: Tensor | None = None,
    eps: float = 0.0, norm_weight: Tensor | None = None, scaled: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:  # fmt: skip
    """As linear_w4a16, with a matrix as in fp8.py."""
    plain = fp8.dequantised(weight, scales, scale_rows, scale_columns)
    _linear(x, plain, bias, out, epilogue, x_squares, eps, norm_weight, scaled, squares)


def dequantise_fp8(
    weight: Tensor, scales: Tensor, scale_rows: int, scale_columns: int, out: Tensor
) -> None:
    """out = the matrix, each element rounded once."""
    out.copy_(fp8.dequantised(weight, scales, scale_rows, scale_columns))


def serves_linear_fp8(x: Tensor, weight: Tensor) -> bool:
    """As serves_linear."""
    return True


def linear_w8a8(
    x: Tensor, weight: Tensor, scales: Tensor, scale_rows: int, scale_columns: int,
    bias: Tensor | None, out: Tensor, scratch: Tensor, epilogue: int = 0,
) -> None:  # fmt: skip
    """linear_fp8 with x rounded by fp8.rounded_rows, without norms."""
    rounded, x_scales = fp8.rounded_rows(x)
    plain = fp8.dequantised(rounded, x_scales.T, 1, fp8.GROUP_COLUMNS)
    sums = plain @ fp8.dequantised(weight, scales, scale_rows, scale_columns).T
    if bias is not None:
        sums += bias.float()
    if epilogue == 2:
        gate, up = sums.chunk(2, 1)
        sums = functional.silu(gate) * up
    out.copy_(sums + out.float() if epilogue == 1 else sums)


def grouped_linear_fp8(
    x: Tensor, weight: Tensor, scales: Tensor, scale_rows: int, scale_columns: int,
    order: Tensor | None, offsets: Tensor, max_group: int, out: Tensor,
) -> None:  # fmt: skip
    """As grouped_linear_w4a16."""
    plain = fp8.dequantised(weight, scales, scale_rows, scale_columns)
    _grouped(x, plain, order, offsets, max_group, out)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, epilogue: int,
    x_squares: Tensor | None, eps: float, norm_weight: Tensor | None, scaled: Tensor | None,
    squares: Tensor | None,
) -> None:  # fmt: skip
    if epilogue == 1:
        linear_add(x, weight, bias, out, norm_weight, scaled, squares)
    else:
        (linear_silu_mul if epilogue else linear)(x, weight, bias, out, x_squares, eps)


def _grouped(
    x: Tensor, weight: Tensor, order: Tensor | None, offsets: Tensor, max_group: int, out: Tensor
) -> None:
    if order is None:
        grouped_linear(x, weight, offsets, max_group, out)
    else:
        sorted_x = x.new_empty(len(order), x.shape[1])
        grouped_linear_silu_mul(x, weight, order, offsets, sorted_x, out)
