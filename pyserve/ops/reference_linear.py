"""Plain-torch twins of the linear ops and of the activations; see reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

SQUARES_COLUMNS = 16  # columns of the residual for each sum of squares: cuda/common/epilogue.h


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor | None = None,
    eps: float = 0.0,
) -> None:  # fmt: skip
    """out = x weight^T + bias; with x_squares, the product is divided by the residual's rms."""
    out.copy_(_linear_float32(x, weight, bias, x_squares, eps))


def linear_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor,
    norm_weight: Tensor | None = None, scaled: Tensor | None = None, squares: Tensor | None = None,
) -> None:  # fmt: skip
    """residual += x weight^T + bias, rounded once; with norm_weight, also writes `scaled` and
    `squares`, as ops.linear_add_for_norm."""
    residual.copy_(residual.float() + _linear_float32(x, weight, bias))
    if norm_weight is not None:
        assert scaled is not None and squares is not None
        leave_norm(residual, norm_weight, scaled, squares)


def leave_norm(residual: Tensor, norm_weight: Tensor, scaled: Tensor, squares: Tensor) -> None:
    """scaled and squares of linear_add."""
    scaled.copy_(residual.float() * norm_weight.float())
    pad = -residual.shape[1] % SQUARES_COLUMNS
    padded = torch.nn.functional.pad(residual.float().square(), (0, pad))
    squares.copy_(padded.view(len(padded), -1, SQUARES_COLUMNS).sum(2))


def linear_silu_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor | None = None,
    eps: float = 0.0,
) -> None:  # fmt: skip
    """out = silu(gate) * up of gate | up = x weight^T + bias, rounded once."""
    silu_mul(_linear_float32(x, weight, bias, x_squares, eps), out)


def _linear_float32(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_squares: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    product = x.float() @ weight.float().T
    if x_squares is not None:
        product *= torch.rsqrt(x_squares.sum(1, keepdim=True) / x.shape[1] + eps)
    return product if bias is None else product + bias.float()


def serves_linear(weight: Tensor, m: int, epilogue: int) -> bool:
    """Whether our own op is the fastest: always, as there is no other here."""
    return True


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """out = gate * sigmoid(gate) * up (Shazeer 2020)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def gelu_tanh_mul(gate_up: Tensor, out: Tensor) -> None:
    """out = gelu(gate) * up by the tanh approximation (Hendrycks and Gimpel 2016)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)
