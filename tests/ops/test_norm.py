"""rms_norm and add_rms_norm: ratio rule, odd sizes, strides, aliasing, refusals."""

from __future__ import annotations

import pytest
import torch

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle
from tests.ops.norm_case import check_norm_of_what_is_added

HIDDEN = (1, 7, 16, 33, 64, 256, 1000, 4096)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rms_norm(dtype: torch.dtype, hidden: int, scale: float) -> None:
    torch.manual_seed(hidden)
    for num_rows in (1, 3, 130):
        x = (torch.randn(num_rows, hidden) * scale).to(dtype)
        weight = torch.randn(hidden).to(dtype)
        plain = torch.empty_like(x)
        reference.rms_norm(x, weight, 1e-6, plain)
        oracle.assert_ratio(ops.rms_norm(x, weight, 1e-6), plain, oracle.rms_norm(x, weight, 1e-6))
        reference.rms_norm(x, weight, 1e-6, plain, 1.0)
        exact = oracle.rms_norm(x, weight, 1e-6, 1.0)
        oracle.assert_ratio(ops.rms_norm(x, weight, 1e-6, offset=1.0), plain, exact)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_add_rms_norm(dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(hidden)
    x, residual = torch.randn(2, 9, hidden).to(dtype)
    weight = torch.randn(hidden).to(dtype)
    twin_residual, plain = residual.clone(), torch.empty_like(x)
    exact_residual = (x.double() + residual.double()).to(dtype)
    reference.add_rms_norm(x, twin_residual, weight, 1e-5, plain)
    out = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(twin_residual, exact_residual)
    assert torch.equal(residual, twin_residual)  # one addition, rounded once: no tolerance
    oracle.assert_ratio(out, plain, oracle.rms_norm(residual, weight, 1e-5))
    reference.add_rms_norm(x, twin_residual, weight, 1e-5, plain, 1.0)
    out = ops.add_rms_norm(x, residual, weight, 1e-5, offset=1.0)
    assert torch.equal(residual, twin_residual)
    oracle.assert_ratio(out, plain, oracle.rms_norm(residual, weight, 1e-5, 1.0))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_norm_of_what_is_added(dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(hidden)
    x, residual = torch.randn(2, 9, hidden).to(dtype)
    weight, x_weight = torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)
    check_norm_of_what_is_added(x, residual, weight, x_weight)


def test_strided_rows_and_leading_dims() -> None:
    wide = torch.randn(6, 200)
    weight = torch.randn(72)
    view = wide[:, 40:112]
    torch.testing.assert_close(
        ops.rms_norm(view, weight, 1e-6), ops.rms_norm(view.contiguous(), weight, 1e-6)
    )
    cube = torch.randn(2, 3, 72)
    flat = ops.rms_norm(cube.view(6, 72), weight, 1e-6)
    assert torch.equal(ops.rms_norm(cube, weight, 1e-6).view(6, 72), flat)
    assert torch.equal(ops.rms_norm(cube[0, 0], weight, 1e-6), flat[0])
    assert torch.equal(ops.rms_norm(cube[:, 1:2], weight, 1e-6).view(2, 72), flat[[1, 4]])


def test_out_may_be_x_and_every_element_is_written() -> None:
    x, weight = torch.randn(5, 100), torch.ones(100)
    expected = ops.rms_norm(x, weight, 1e-6)
    out = torch.full_like(x, float("nan"))
    torch.ops.pyserve.rms_norm(x, weight, 1e-6, out)
    assert torch.equal(out, expected)
    torch.ops.pyserve.rms_norm(x, weight, 1e-6, x)
    assert torch.equal(x, expected)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 64)
    x[2, 5] = float("nan")
    out = ops.rms_norm(x, torch.ones(64), 1e-6)
    assert out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()


def test_empty() -> None:
    assert ops.rms_norm(torch.empty(0, 64), torch.ones(64), 1e-6).shape == (0, 64)


def test_refusals() -> None:
    x, weight = torch.randn(2, 64), torch.ones(64)
    with pytest.raises(RuntimeError, match="weight is 63, expected 64"):
        ops.rms_norm(x, weight[:63], 1e-6)
    with pytest.raises(RuntimeError, match="weight is BFloat16, x is Float"):
        ops.rms_norm(x, weight.bfloat16(), 1e-6)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16, got Half"):
        ops.rms_norm(x.half(), weight.half(), 1e-6)
    with pytest.raises(RuntimeError, match="last dim of x must be contiguous"):
        ops.rms_norm(torch.randn(64, 2).t(), weight, 1e-6)
    with pytest.raises(RuntimeError, match="residual and x differ in shape"):
        ops.add_rms_norm(x, torch.randn(3, 64), weight, 1e-6)
    with pytest.raises(RuntimeError, match="x_weight is 63, expected 64"):
        ops.add_rms_norm(x, x.clone(), weight, 1e-6, x_weight=weight[:63])
    with pytest.raises(RuntimeError, match="rows of x are not evenly spaced"):
        ops.rms_norm(torch.randn(3, 4, 64)[:, :2], weight, 1e-6)
