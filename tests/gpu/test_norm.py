"""rms_norm and add_rms_norm on CUDA: ratio rule, vector and plain kernels, strides, aliasing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle
from tests.ops.norm_case import check_norm_of_what_is_added

DTYPES = (torch.bfloat16, torch.float16)
# Multiples of 8 take the vector kernel up to 16384; 60, 1001 and 16392 the plain one.
HIDDEN = (1, 8, 60, 64, 256, 1001, 3584, 4096, 5120, 8192, 16384, 16392)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_rms_norm(dtype: torch.dtype, hidden: int, scale: float) -> None:
    torch.manual_seed(hidden)
    weight = random(hidden, dtype=dtype)
    for num_rows in (1, 3, 130):
        x = random(num_rows, hidden, dtype=dtype) * scale
        plain, out = torch.empty_like(x), torch.full_like(x, float("nan"))
        reference.rms_norm(x, weight, 1e-6, plain)
        torch.ops.pyserve.rms_norm(x, weight, 1e-6, out)
        oracle.assert_ratio(out, plain, oracle.rms_norm(x, weight, 1e-6))
        reference.rms_norm(x, weight, 1e-6, plain, 1.0)
        offset = ops.rms_norm(x, weight, 1e-6, offset=1.0)
        oracle.assert_ratio(offset, plain, oracle.rms_norm(x, weight, 1e-6, 1.0))
        torch.ops.pyserve.rms_norm(x[-1:], weight, 1e-6, plain[-1:])
        assert torch.equal(plain[-1], out[-1])  # a row does not depend on the others


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_add_rms_norm(dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(hidden)
    x, residual = random(2, 9, hidden, dtype=dtype)
    weight = random(hidden, dtype=dtype)
    twin_residual, plain = residual.clone(), torch.empty_like(x)
    reference.add_rms_norm(x, twin_residual, weight, 1e-5, plain)
    out = torch.full_like(x, float("nan"))
    torch.ops.pyserve.add_rms_norm(x, residual, weight, 1e-5, out)
    assert torch.equal(residual, twin_residual)  # one addition, rounded once: no tolerance
    oracle.assert_ratio(out, plain, oracle.rms_norm(residual, weight, 1e-5))
    reference.add_rms_norm(x, twin_residual, weight, 1e-5, plain, 1.0)
    torch.ops.pyserve.add_rms_norm(x, residual, weight, 1e-5, out, 1.0)
    assert torch.equal(residual, twin_residual)
    oracle.assert_ratio(out, plain, oracle.rms_norm(residual, weight, 1e-5, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_norm_of_what_is_added(dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(hidden)
    x, residual = random(2, 9, hidden, dtype=dtype)
    weight, x_weight = random(hidden, dtype=dtype), random(hidden, dtype=dtype)
    check_norm_of_what_is_added(x, residual, weight, x_weight)


@pytest.mark.parametrize("begin", [40, 41])  # 16-byte aligned rows, and not
def test_strided_rows_and_leading_dims(begin: int) -> None:
    wide, weight = random(6, 200), random(72)
    view = wide[:, begin : begin + 72]
    contiguous = ops.rms_norm(view.contiguous(), weight, 1e-6)
    torch.testing.assert_close(ops.rms_norm(view, weight, 1e-6), contiguous)
    out = torch.full_like(wide, 7.0)
    torch.ops.pyserve.rms_norm(view, weight, 1e-6, out[:, begin : begin + 72])
    torch.testing.assert_close(out[:, begin : begin + 72], contiguous)
    assert bool((out[:, :begin] == 7).all() & (out[:, begin + 72 :] == 7).all())
    cube = random(2, 3, 72)
    flat = ops.rms_norm(cube.view(6, 72), weight, 1e-6)
    assert torch.equal(ops.rms_norm(cube, weight, 1e-6).view(6, 72), flat)
    assert torch.equal(ops.rms_norm(cube[:, 1:2], weight, 1e-6).view(2, 72), flat[[1, 4]])


@pytest.mark.parametrize("hidden", [100, 4096])
def test_out_may_be_x_and_nan_stays_in_its_row(hidden: int) -> None:
    x, weight = random(5, hidden), random(hidden)
    x[2, 5] = float("nan")
    expected = ops.rms_norm(x, weight, 1e-6)
    assert bool(expected[2].isnan().all()) and bool(expected[[0, 1, 3, 4]].isfinite().all())
    torch.ops.pyserve.rms_norm(x, weight, 1e-6, x)
    assert torch.equal(x.nan_to_num(), expected.nan_to_num())


def test_empty() -> None:
    assert ops.rms_norm(random(0, 64), random(64), 1e-6).shape == (0, 64)


def test_refusals() -> None:
    x, weight = random(2, 64), random(64)
    with pytest.raises(RuntimeError, match="weight is 63, expected 64"):
        ops.rms_norm(x, weight[:63], 1e-6)
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16, got Float"):
        ops.rms_norm(x.float(), weight.float(), 1e-6)
    with pytest.raises(RuntimeError, match="weight must be on a CUDA device"):
        ops.rms_norm(x, weight.cpu(), 1e-6)
    with pytest.raises(RuntimeError, match="residual and x differ in shape"):
        ops.add_rms_norm(x, random(3, 64), weight, 1e-6)
    with pytest.raises(RuntimeError, match="x_weight is 63, expected 64"):
        ops.add_rms_norm(x, x.clone(), weight, 1e-6, x_weight=weight[:63])
