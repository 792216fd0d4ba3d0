"""linear_fp8 and dequantise_fp8: every e4m3 there is; the ratio rule on odd shapes and scales; a
row's result depends on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import fp8, quantised, reference
from tests.ops import oracle

# (n, k, scale_rows, scale_columns): blocks that fit, that do not; a scale a row; parts of blocks.
CASES = [(256, 256, 128, 128), (130, 448, 128, 128), (35, 300, 1, 300), (24, 96, 8, 64)]
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 17)
NAN = 0x7F  # and with its sign


def make(n: int, k: int, scale_rows: int, scale_columns: int) -> quantised.Fp8Matrix:
    """Of all numbers but NaN."""
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    weight[(weight & 0x7F) == NAN] = 0x38
    shape = -(-n // scale_rows), -(-k // scale_columns)
    scales = torch.rand(shape, generator=generator) + 0.5
    return quantised.Fp8Matrix(weight, scales, scale_rows, scale_columns)


def run(x: Tensor, matrix: quantised.Fp8Matrix, bias: Tensor | None) -> Tensor:
    """The op itself, whatever the number of rows, into memory that holds NaN."""
    out = torch.full((len(x), len(matrix.weight)), float("nan"), dtype=x.dtype)
    torch.ops.pyserve.linear_fp8(x, *matrix, bias, out)
    return out


def by_definition(byte: int) -> float:
    """The number of a byte: OCP 8-bit floating point, E4M3."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if byte & 0x7F == NAN:
        return float("nan")
    value = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -value if sign else value


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_number_there_is(dtype: torch.dtype) -> None:
    """In both ops, at every place of a block; a NaN stays one."""
    expected = torch.tensor([by_definition(byte) for byte in range(256)])
    scales = torch.tensor([[1.0, 0.5]])
    for shift in (0, 1, 37):
        weight = torch.arange(256).roll(shift).to(torch.uint8)[None]
        numbers = expected.roll(shift) * scales.repeat_interleave(128, 1)
        twin = fp8.dequantised(weight, scales, 1, 128)
        torch.testing.assert_close(twin, numbers, rtol=0, atol=0, equal_nan=True)
        out = torch.empty(1, 256, dtype=dtype)
        torch.ops.pyserve.dequantise_fp8(weight, scales, 1, 128, out)
        torch.testing.assert_close(out, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
        weight[(weight & 0x7F) == NAN] = 0
        matrix = quantised.Fp8Matrix(weight, scales, 1, 128)
        columns = run(torch.eye(256, dtype=dtype), matrix, None)
        assert torch.equal(columns.T, numbers.nan_to_num(0).to(dtype)), "basis vectors"
    weight[0, 200] = NAN
    assert bool(run(torch.ones(1, 256, dtype=dtype), matrix, None).isnan().all())


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_linear(case: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, k, *_ = case
    matrix = make(*case)
    plain = fp8.dequantised(*matrix)
    out = torch.full((n, k + 3), float("nan"), dtype=dtype)
    quantised.dequantise(matrix, out[:, :k])
    assert torch.equal(out[:, :k], plain.to(dtype)) and bool(out[:, k:].isnan().all())
    assert torch.equal(run(torch.eye(k, dtype=dtype), matrix, None), plain.T.to(dtype))
    weight = plain.double()
    for num_rows in ROW_COUNTS:
        torch.manual_seed(num_rows)
        x, bias = torch.randn(num_rows, k).to(dtype), torch.randn(n).to(dtype)
        for given in (bias, None):
            twin = torch.empty(num_rows, n, dtype=dtype)
            reference.linear_fp8(x, *matrix, given, twin)
            exact = x.double() @ weight.T + (0 if given is None else given.double())
            errors = oracle.product_errors(x, weight)
            oracle.assert_ratio(run(x, matrix, given), twin, exact, sum_errors=errors)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_epilogues(dtype: torch.dtype) -> None:
    """Added, activated, and with a norm before or behind: twins, and float64."""
    n, k = 70, 300
    matrix = make(n, k, 1, k)
    matrix = matrix._replace(scales=matrix.scales / 100)
    sums_of = fp8.dequantised(*matrix).double()
    op, twin = torch.ops.pyserve.linear_fp8, reference.linear_fp8
    for num_rows in (1, 3, 17):
        x, bias = torch.randn(num_rows, k).to(dtype), torch.randn(n).to(dtype)
        x_squares = 20 * torch.rand(num_rows, ops.num_squares(k))
        factor = (x_squares.double().sum(1, keepdim=True) / k + 1e-5).rsqrt()
        sums, errors = x.double() @ sums_of.T, oracle.product_errors(x, sums_of)
        for given, factors in ((x_squares, factor), (None, 1.0)):
            out, plain = torch.full((2, num_rows, n // 2), float("nan"), dtype=dtype)
            op(x, *matrix, bias, out, 2, given, 1e-5)
            twin(x, *matrix, bias, plain, 2, given, 1e-5)
            gate_up = sums * factors + bias.double()
            of_both = oracle.silu_mul_errors(gate_up, errors * factors)
            oracle.assert_ratio(out, plain, oracle.silu_mul(gate_up), sum_errors=of_both)
        residual, norm_weight = torch.randn(num_rows, n).to(dtype), torch.randn(n).to(dtype)
        out, plain = residual.clone(), residual.clone()
        scaled = torch.full((2, num_rows, n), float("nan"), dtype=dtype)
        squares = torch.full((2, num_rows, ops.num_squares(n)), float("nan"))
        op(x, *matrix, bias, out, 1, None, 0.0, norm_weight, scaled[0], squares[0])
        twin(x, *matrix, bias, plain, 1, None, 0.0, norm_weight, scaled[1], squares[1])
        exact = residual.double() + sums + bias.double()
        oracle.assert_ratio(out, plain, exact, sum_errors=errors)
        assert torch.equal(scaled[0], (out.float() * norm_weight.float()).to(dtype))
        torch.testing.assert_close(*squares, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_row_does_not_depend_on_its_batch_mates(dtype: torch.dtype) -> None:
    matrix = make(*CASES[1])
    x = torch.randn(17, matrix.weight.shape[1]).to(dtype)
    together = run(x, matrix, None)
    for num_rows in ROW_COUNTS:
        assert torch.equal(run(x[:num_rows], matrix, None), together[:num_rows])
        assert torch.equal(run(x[-num_rows:], matrix, None), together[-num_rows:])
    x[3, 0], x[11, 1] = float("nan"), float("inf")
    result = run(x, matrix, None)
    assert bool(result[3].isnan().all()) and not bool(result[11].isfinite().all())
    others = [row for row in range(17) if row not in (3, 11)]
    assert torch.equal(result[others], together[others])
    wide = torch.full((17, 140), float("nan"), dtype=dtype)
    torch.ops.pyserve.linear_fp8(x, *matrix, None, wide[:, 2:132])
    assert torch.equal(wide[others, 2:132], result[others]), "strided rows"
    assert bool(wide[:, :2].isnan().all()) and bool(wide[:, 132:].isnan().all())


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("num_rows", [8, 130])
def test_many_rows_by_slices_of_plain_numbers(num_rows: int, dtype: torch.dtype) -> None:
    n, k = 300, 256
    matrix = make(n, k, 128, 128)._replace(scales=torch.rand(3, 2) / 500)
    torch.manual_seed(0)
    x, bias = torch.randn(num_rows, k).to(dtype), torch.randn(n).to(dtype)
    sums = x.double() @ fp8.dequantised(*matrix).double().T + bias.double()
    rounded = torch.nn.functional.linear(x, fp8.dequantised(*matrix).to(dtype), bias)
    scratch = torch.full((200 * k,), float("nan"), dtype=dtype)  # one block of rows at a time
    wide = torch.full((num_rows, n + 5), float("nan"), dtype=dtype)
    quantised.linear(x, matrix, bias, wide[:, :n], scratch)
    oracle.assert_ratio(wide[:, :n], rounded, sums, plain_float32_error=2e-2)
    assert bool(wide[:, n:].isnan().all())
    residual = torch.randn(num_rows, n).to(dtype)
    exact, plain = residual.double() + sums, residual + rounded
    quantised.linear_add(x, matrix, bias, residual, scratch)
    oracle.assert_ratio(residual, plain, exact, plain_float32_error=2e-2)
    out, gate_up = torch.empty(num_rows, n // 2, dtype=dtype), torch.empty(num_rows, n, dtype=dtype)
    quantised.linear_silu_mul(x, matrix, bias, out, gate_up, scratch)
    oracle.assert_ratio(out, ops.silu_mul(rounded), oracle.silu_mul(sums), plain_float32_error=2e-2)


def test_the_number_of_threads_changes_nothing() -> None:
    matrix = make(2050, 512, 128, 128)
    num_threads = torch.get_num_threads()
    x, results = torch.randn(5, 512), []
    try:
        for i in range(3):
            torch.set_num_threads(i + 1)
            results.append(run(x, matrix, None))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert run(torch.empty(0, 512), matrix, None).shape == (0, 2050)


def test_what_does_not_fit_is_an_error() -> None:
    matrix, x, out = make(256, 256, 128, 128), torch.randn(2, 256), torch.empty(2, 256)
    weight, scales = matrix.weight, matrix.scales
    for args, words in [
        ((x[:, :64], weight, scales, 128, 128, None, out), "size 1 of weight is 256, expected 64"),
        ((x, weight, scales, 128, 128, None, out[:, :40]), "size 0 of weight is 256, expected 40"),
        ((x, weight, scales[:1], 128, 128, None, out), "size 0 of scales is 1, expected 2"),
        ((x, weight, scales, 128, 256, None, out), "size 1 of scales is 2, expected 1"),
        ((x, weight, scales, 0, 128, None, out), "scale_rows is 0"),
        ((x, weight, scales, 128, 96, None, out), "scale_columns is 96, neither a multiple of 64"),
        ((x, weight.t(), scales, 128, 128, None, out), "weight must be contiguous"),
        ((x, weight.view(fp8.E4M3), scales, 128, 128, None, out), "weight must be Byte"),
        ((x, weight, scales.double(), 128, 128, None, out), "scales must be Float"),
        ((x, weight, scales, 128, 128, torch.ones(23), out), "size 0 of bias is 23"),
        ((x, weight, scales, 128, 128, None, out, 3), "epilogue is 3, not 0, 1 or 2"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            torch.ops.pyserve.linear_fp8(*args)
    with pytest.raises(RuntimeError, match="size 0 of out is 4"):
        torch.ops.pyserve.dequantise_fp8(*matrix, torch.empty(4, 256))


def test_rounding_is_to_the_nearest_with_a_scale_a_row() -> None:
    weight = torch.randn(6, 96) * torch.tensor([1e-5, 1e-2, 1.0, 30.0, 1e6, 0.0])[:, None]
    numbers, scales = fp8.quantised(weight)
    found = numbers.float() * scales[:, None]
    step = weight.abs().clamp(min=2.0**-6 * scales[:, None]) / 16  # half of the last bit of 3
    assert bool(((found - weight).abs() <= 1.001 * step).all())
    largest = weight.abs().amax(1)
    torch.testing.assert_close(found.abs().amax(1), largest, rtol=1e-6, atol=0)
