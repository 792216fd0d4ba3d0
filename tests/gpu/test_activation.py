"""silu_mul and gelu_tanh_mul on CUDA: ratio rule over all gates, odd sizes, strides, refusals."""

from __future__ import annotations

import pytest
import torch

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 688, 4096, 14336])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    for num_tokens in (1, 2, 67):
        gate_up = (torch.randn(num_tokens, 2 * width, device="cuda") * 4).to(dtype)
        plain = torch.empty(num_tokens, width, dtype=dtype, device="cuda")
        out = torch.full_like(plain, float("nan"))
        reference.silu_mul(gate_up, plain)
        torch.ops.pyserve.silu_mul(gate_up, out)
        oracle.assert_ratio(out, plain, oracle.silu_mul(gate_up))
        reference.gelu_tanh_mul(gate_up, plain)
        torch.ops.pyserve.gelu_tanh_mul(gate_up, out.fill_(float("nan")))
        oracle.assert_ratio(out, plain, oracle.gelu_tanh_mul(gate_up))


def test_relative_error_everywhere() -> None:
    """bfloat16 rounds by 2^-8 at most; what comes before that adds next to nothing."""
    gate = torch.linspace(-80, 80, 10_000, device="cuda").bfloat16()[None]
    gate_up = torch.cat((gate, torch.ones_like(gate)), 1)
    exact = oracle.silu_mul(gate_up)
    error = (ops.silu_mul(gate_up).double() - exact)[exact != 0] / exact[exact != 0]
    assert float(error.abs().max()) < 2**-8 * 1.01
    # Where gelu is tiny, float64's 1 + tanh is off by 1e-16.
    exact, out = oracle.gelu_tanh_mul(gate_up), ops.gelu_tanh_mul(gate_up).double()
    assert bool(((out - exact).abs() <= 2**-8 * 1.01 * exact.abs() + 1e-13).all())


def test_extremes() -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 1e30, -1e30, inf, nan] * 2, device="cuda")
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None].bfloat16()
    out, expected = ops.silu_mul(gate_up)[0], torch.nn.functional.silu(gate.bfloat16())
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[[0, 1, 2, 4, 6]], expected[[0, 1, 2, 4, 6]])
    assert float(out[[3, 5]].abs().max()) < 1e-35
    out = ops.gelu_tanh_mul(gate_up)[0]
    expected = torch.nn.functional.gelu(gate.bfloat16(), approximate="tanh")
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[[0, 1, 2, 4, 6]], expected[[0, 1, 2, 4, 6]])
    assert float(out[[3, 5]].abs().max()) < 1e-35


@pytest.mark.parametrize("begin", [8, 9])
def test_strided_rows(begin: int) -> None:
    wide = torch.randn(5, 104, device="cuda").bfloat16()
    view = wide[:, begin : begin + 64]
    assert torch.equal(ops.silu_mul(view), ops.silu_mul(view.contiguous()))
    out = torch.full_like(wide, 7.0)
    torch.ops.pyserve.silu_mul(view, out[:, begin : begin + 32])
    assert torch.equal(out[:, begin : begin + 32], ops.silu_mul(view))
    assert bool((out[:, :begin] == 7).all() & (out[:, begin + 32 :] == 7).all())


def test_empty() -> None:
    assert ops.silu_mul(torch.empty(0, 64, device="cuda").bfloat16()).shape == (0, 32)
    assert ops.silu_mul(torch.empty(3, 0, device="cuda").bfloat16()).shape == (3, 0)


def test_refusals() -> None:
    with pytest.raises(RuntimeError, match="size 1 of gate_up is 7, expected 6"):
        ops.silu_mul(torch.randn(2, 7, device="cuda").half())
    with pytest.raises(RuntimeError, match="gate_up must be bfloat16 or float16, got Float"):
        ops.silu_mul(torch.randn(2, 8, device="cuda"))
