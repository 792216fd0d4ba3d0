"""Float64 meaning of the float ops, written apart from the twins, and the ratio rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def assert_ratio(
    actual: Tensor, plain: Tensor, exact: Tensor, *, plain_float32_error: float = 1e-6,
    sum_errors: Tensor | None = None,
) -> None:  # fmt: skip
    """Error against float64 <= 2 x that of plain torch in the same dtype, plus 1e-6 relative.

    `plain` is held against `exact` first, as its error is what `actual` is allowed: float32 work,
    `plain_float32_error` of the largest value and the largest of `sum_errors`, and one rounding to
    the dtype.
    """
    assert actual.shape == plain.shape == exact.shape
    for result in (plain, actual):
        assert torch.equal(result.isnan(), exact.isnan())
        assert torch.equal(result.isinf(), exact.isinf())
    finite = exact.isfinite()
    if not bool(finite.any()):
        return
    largest = exact[finite].abs().max()
    plain_error = (plain.double() - exact)[finite].abs().max()
    info = torch.finfo(plain.dtype)
    rounding = 0.0 if plain.dtype == torch.float32 else info.eps / 2
    plain_allowed = (plain_float32_error + rounding) * largest + rounding * info.smallest_normal
    if sum_errors is not None:
        plain_allowed = plain_allowed + sum_errors.max()
    assert plain_error <= plain_allowed, f"plain: {plain_error:.3g}, allowed {plain_allowed:.3g}"
    error = (actual.double() - exact)[finite].abs().max()
    allowed = 2 * plain_error + 1e-6 * largest
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def product_errors(x: Tensor, weight: Tensor) -> Tensor:
    """float64 [rows, n]: how far float32 sums may be from x weight^T, in whichever order.

    Each of the k additions is rounded by 2^-24 of the sum so far, up or down as it comes: together
    that is sqrt(k) x 2^-24 of the sum of |x_i w_i| (Higham and Mary 2019). The worst, k of them in
    one direction, does not come about.
    """
    sums = x.double().abs() @ weight.double().abs().T
    return x.shape[1] ** 0.5 * 2**-24 * sums


def silu_mul_errors(gate_up: Tensor, errors: Tensor) -> Tensor:
    """What silu_mul makes of small errors of gate | up: silu is no steeper than 1.1."""
    gate, up = gate_up.double().chunk(2, -1)
    of_gate, of_up = errors.chunk(2, -1)
    return 1.1 * up.abs() * of_gate + (gate / (1 + (-gate).exp())).abs() * of_up


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    inner = (2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate * (1 + inner.tanh()) / 2 * up


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """x [num_tokens, num_heads, head_dim]."""
    half = cos_sin.shape[1] // 2
    angle = torch.complex(*cos_sin.double()[positions.long()].split(half, -1))[:, None]
    x = x.double()
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * angle
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float = 0.0
) -> Tensor:
    """One sequence: q [query_len, num_heads, head_dim], k, v [seq_len, num_kv_heads, head_dim]."""
    query_len, num_heads, _ = q.shape
    seq_len, num_kv_heads, _ = k.shape
    k = k.double().repeat_interleave(num_heads // num_kv_heads, 1).transpose(0, 1)
    v = v.double().repeat_interleave(num_heads // num_kv_heads, 1).transpose(0, 1)
    distance = torch.arange(seq_len - query_len, seq_len)[:, None] - torch.arange(seq_len)
    hidden = (distance < 0) | ((distance >= window) if window else torch.tensor(False))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)
