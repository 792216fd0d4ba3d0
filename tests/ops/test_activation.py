"""silu_mul and gelu_tanh_mul: ratio rule over the range of gates, odd sizes, strides, refusals."""

from __future__ import annotations

import pytest
import torch

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 688, 4096])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    for num_tokens in (1, 2, 67):
        gate_up = (torch.randn(num_tokens, 2 * width) * 4).to(dtype)
        plain = torch.empty(num_tokens, width, dtype=dtype)
        reference.silu_mul(gate_up, plain)
        oracle.assert_ratio(ops.silu_mul(gate_up), plain, oracle.silu_mul(gate_up))
        reference.gelu_tanh_mul(gate_up, plain)
        oracle.assert_ratio(ops.gelu_tanh_mul(gate_up), plain, oracle.gelu_tanh_mul(gate_up))


def test_relative_error_everywhere() -> None:
    gate = torch.linspace(-86, 86, 100_001)
    gate_up = torch.stack((gate, torch.ones_like(gate)), 1).reshape(1, -1)
    gate_up = torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), 1)
    exact = oracle.silu_mul(gate_up)
    relative = ((ops.silu_mul(gate_up).double() - exact) / exact)[exact != 0].abs().max()
    assert relative < 4e-7


def test_gelu_is_near_everywhere() -> None:
    """Also where it is tiny: the two halves of 1 + tanh(u) never cancel."""
    gate = torch.linspace(-20, 20, 100_001)
    exact = oracle.gelu_tanh_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    out = ops.gelu_tanh_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0].double()
    # What float64 makes of 1 + tanh is 1e-16 off.
    assert ((out - exact).abs() <= 1e-5 * exact.abs() + 1e-14).all()
    ends = torch.tensor([[-1e30, 1e30, float("nan"), 1.0, 1.0, 1.0]])
    low, high, nan = ops.gelu_tanh_mul(ends)[0].tolist()
    assert abs(low) < 1e-6 and high == gate.new_tensor(1e30).item() and nan != nan


def test_extremes() -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 1e30, -1e30, inf, nan])
    out = ops.silu_mul(torch.cat((gate, torch.ones(8)))[None])[0]
    expected = torch.nn.functional.silu(gate)
    assert torch.equal(out.isnan(), expected.isnan())
    # Below exp's range the result is no more than a rounding of 0.
    torch.testing.assert_close(out[[0, 1, 2, 4, 6]], expected[[0, 1, 2, 4, 6]])
    assert out[3].abs() < 1e-35 and out[5].abs() < 1e-6


def test_strided_rows() -> None:
    wide = torch.randn(5, 100)
    view = wide[:, 10:74]
    assert torch.equal(ops.silu_mul(view), ops.silu_mul(view.contiguous()))


def test_refusals() -> None:
    with pytest.raises(RuntimeError, match="size 1 of gate_up is 7, expected 6"):
        ops.silu_mul(torch.randn(2, 7))
    with pytest.raises(RuntimeError, match="gate_up has 1 dims, expected 2"):
        torch.ops.pyserve.silu_mul(torch.randn(8), torch.empty(1, 4))
