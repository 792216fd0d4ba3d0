"""linear: ratio rule on odd shapes; a row's result depends on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle

ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 64)
# (n, k): whole tiles of AMX; a last panel that overlaps; neither n nor k a multiple of anything.
SHAPES = [(64, 64), (16, 32), (130, 96), (77, 256), (512, 256), (1, 1), (3, 7), (33, 50), (99, 259)]


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op itself, whatever the number of rows, into memory that holds NaN."""
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype)
    torch.ops.pyserve.linear(x, weight, bias, out)
    return out


def make(
    num_rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x, weight, bias = (torch.randn(shape) for shape in [(num_rows, k), (n, k), (n,)])
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.double() @ weight.double().T + bias.double()


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(n: int, k: int, dtype: torch.dtype) -> None:
    for num_rows in ROW_COUNTS:
        x, weight, bias = make(num_rows, n, k, dtype, seed=num_rows)
        plain = torch.empty(num_rows, n, dtype=dtype)
        reference.linear(x, weight, bias, plain)
        oracle.assert_ratio(run(x, weight, bias), plain, exact(x, weight, bias))
        reference.linear(x, weight, None, plain)
        oracle.assert_ratio(run(x, weight), plain, exact(x, weight, torch.zeros(n)))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_does_not_depend_on_its_batch_mates(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = make(max(ROW_COUNTS), n, k, dtype)
    together = run(x, weight, bias)
    for num_rows in ROW_COUNTS:
        assert torch.equal(run(x[:num_rows], weight, bias), together[:num_rows])
        assert torch.equal(run(x[-num_rows:], weight, bias), together[-num_rows:])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    x, weight, bias = make(33, 2050, 512, dtype)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x, weight, bias))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_strided_rows(dtype: torch.dtype) -> None:
    x, weight, bias = make(19, 96, 128, dtype)
    expected = run(x[:, 32:96].contiguous(), weight[:, 64:].contiguous(), bias)
    wide = torch.full((19, 100), float("nan"), dtype=dtype)
    out = wide[:, 2:98]
    torch.ops.pyserve.linear(x[:, 32:96], weight[:, 64:], bias, out)
    assert torch.equal(out, expected)
    assert bool(wide[:, :2].isnan().all()) and bool(wide[:, 98:].isnan().all())
    # Every other row, from the last to the first of them.
    assert torch.equal(run(x[::2, 32:96], weight[:, 64:], bias), expected[::2])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (33, 50)])
def test_a_row_of_nan_or_inf_stays_alone(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = make(20, n, k, dtype)
    expected = run(x, weight, bias)
    x[3, 0], x[17, 1] = float("nan"), float("inf")
    result = run(x, weight, bias)
    assert bool(result[3].isnan().all())
    assert not bool(result[17].isfinite().any())
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_no_rows_no_columns_nothing_to_sum(dtype: torch.dtype) -> None:
    assert run(torch.empty(0, 32, dtype=dtype), torch.ones(16, 32, dtype=dtype)).shape == (0, 16)
    assert run(torch.ones(2, 32, dtype=dtype), torch.empty(0, 32, dtype=dtype)).shape == (2, 0)
    bias = torch.arange(16).to(dtype)
    nothing = run(torch.empty(2, 0, dtype=dtype), torch.empty(16, 0, dtype=dtype), bias)
    assert torch.equal(nothing, bias.expand(2, 16))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_torch_takes_many_rows(dtype: torch.dtype) -> None:
    few = ops.FEW_ROWS["cpu", dtype]
    x, weight, bias = make(few + 1, 48, 96, dtype)
    for given in (bias, None):
        expected = functional.linear(x, weight, given)
        assert torch.equal(ops.linear(x, weight, given), expected)
        out = torch.full_like(expected, torch.nan)
        assert ops.linear(x, weight, given, out) is out and torch.equal(out, expected)
    assert torch.equal(ops.linear(x[:few], weight, bias), run(x[:few], weight, bias))
    assert torch.equal(ops.linear(x[:1], weight), run(x[:1], weight))


def test_refusals() -> None:
    x, weight, bias = make(2, 4, 8, torch.float32)
    with pytest.raises(RuntimeError, match="size 1 of weight is 8, expected 7"):
        run(x[:, :7], weight)
    with pytest.raises(RuntimeError, match="size 0 of bias is 3, expected 4"):
        run(x, weight, bias[:3])
    with pytest.raises(RuntimeError, match="weight is BFloat16, x is Float"):
        run(x, weight.bfloat16())
    with pytest.raises(RuntimeError, match="last dim of x must be contiguous"):
        run(x.T.contiguous().T, weight)
    with pytest.raises(RuntimeError, match="size 0 of out is 1, expected 2"):
        torch.ops.pyserve.linear(x, weight, None, torch.empty(1, 4))
