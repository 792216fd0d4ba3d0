"""linear_fp8, dequantise_fp8 and grouped_linear_fp8 on a card: every e4m3 there is, the ratio rule,
rows that depend on nothing but themselves, and norms that are factors. What the kernels do is held
on a CPU too: tests/ops/few_rows_fp8.cpp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import experts, fp8, quantised
from tests.ops import oracle

CARD = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
STORE, ADD, SILU_MUL = range(3)  # Epilogue in cuda/common/epilogue.h
# n, k, rows and columns of a scale
SHAPES = [(64, 256, 128, 128), (24, 384, 1, 384), (40, 112, 8, 128), (4096, 4096, 128, 128),
          (320, 14336, 1, 14336)]  # fmt: skip


def make(n: int, k: int, scale_rows: int, scale_columns: int, *count: int) -> quantised.Fp8Matrix:
    generator = torch.Generator(CARD).manual_seed(n + k)
    weight = torch.empty(*count, n, k, dtype=fp8.E4M3, device=CARD)
    unit = 0.02 * fp8.fill_with_noise(weight, generator)
    shape = *count, -(-n // scale_rows), -(-k // scale_columns)
    scales = unit * (torch.rand(shape, device=CARD, generator=generator) + 0.5)
    return quantised.Fp8Matrix(weight.view(torch.uint8), scales, scale_rows, scale_columns)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_there_is(dtype: torch.dtype) -> None:
    """Basis vectors in the kernel, which takes a NaN for 480; the other op does not."""
    weight = torch.arange(256, device=CARD).to(torch.uint8).repeat(16, 2)
    scales = torch.rand(16, 4, device=CARD).to(dtype).float() + 0.5
    matrix = quantised.Fp8Matrix(weight, scales, 1, 128)
    plain = fp8.dequantised(*matrix)
    out = torch.full((16, 520), 9.0, dtype=dtype, device=CARD)
    quantised.dequantise(matrix, out[:, :512])
    torch.testing.assert_close(out[:, :512], plain.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert bool((out[:, 512:] == 9).all())
    for begin in range(0, 512, 8):
        x = torch.eye(512, dtype=dtype, device=CARD)[begin : begin + 8]
        out = torch.empty(8, 16, dtype=dtype, device=CARD)
        torch.ops.pyserve.linear_fp8(x, *matrix, None, out)
        wanted = plain[:, begin : begin + 8].T.to(dtype)
        is_number = ~wanted.isnan()
        assert torch.equal(out[is_number], wanted[is_number])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_of_few_rows(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """For each number of rows; no row looks at another."""
    n, k, *_ = shape
    matrix = make(*shape)
    weight = fp8.dequantised(*matrix)
    wide = torch.randn(16, k + 8, device=CARD).to(dtype)
    wide[:, k:] = float("nan")
    x, bias = wide[:, :k], torch.randn(n, device=CARD).to(dtype)
    exact = x.double() @ weight.double().T
    results = []
    for num_rows in range(1, 17):
        given = bias if num_rows % 2 else None
        out = torch.full((20, n + 4), float("nan"), dtype=dtype, device=CARD)
        torch.ops.pyserve.linear_fp8(x[:num_rows], *matrix, given, out[:num_rows, :n])
        assert bool(out[num_rows:].isnan().all()) and bool(out[:, n:].isnan().all())
        added = exact[:num_rows] + (0 if given is None else given.double())
        plain = torch.nn.functional.linear(x[:num_rows], weight.to(dtype), given)
        oracle.assert_ratio(out[:num_rows, :n], plain, added, plain_float32_error=1e-2)
        results.append(out[:num_rows, :n].clone())
    for mine, more in zip(results, results[2:], strict=False):
        assert torch.equal(mine, more[: len(mine)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 8, 16, 17, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape: tuple[int, int, int, int], num_rows: int, dtype: torch.dtype) -> None:
    """By what is taken to be the fastest of what rounds no x, with each epilogue."""
    n, k, *_ = shape
    matrix = quantised.Fp8WeightMatrix(*make(*shape))
    weight = fp8.dequantised(*matrix)
    x, bias = torch.randn(num_rows, k, device=CARD).to(dtype), torch.randn(n, device=CARD).to(dtype)
    scratch = torch.full((max(128, n // 256 * 128) * k,), float("nan"), dtype=dtype, device=CARD)
    exact = x.double() @ weight.double().T + bias.double()
    plain = torch.nn.functional.linear(x, weight.to(dtype), bias)
    out = torch.full((num_rows, n), float("nan"), dtype=dtype, device=CARD)
    quantised.linear(x, matrix, bias, out, scratch)
    oracle.assert_ratio(out, plain, exact, plain_float32_error=1e-2)
    residual = torch.randn(num_rows, n, device=CARD).to(dtype)
    wanted, rounded = residual.double() + exact, residual + plain
    quantised.linear_add(x, matrix, bias, residual, scratch)
    oracle.assert_ratio(residual, rounded, wanted, plain_float32_error=2e-2)
    half = torch.full((num_rows, n // 2), float("nan"), dtype=dtype, device=CARD)
    quantised.linear_silu_mul(x, matrix, bias, half, out, scratch)
    wanted = oracle.silu_mul(exact)
    oracle.assert_ratio(half, ops.silu_mul(plain), wanted, plain_float32_error=2e-2)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_factors(dtype: torch.dtype) -> None:
    """Before sums, before an activation, and behind an addition."""
    n, k = 320, 832
    matrix = make(n, k, 128, 128)
    weight = fp8.dequantised(*matrix).double()
    bias, norm_weight = torch.randn(2, n, device=CARD).to(dtype)
    op = torch.ops.pyserve.linear_fp8
    for num_rows in (1, 5, 8, 9, 16):
        x = torch.randn(num_rows, k, device=CARD).to(dtype)
        x_squares = 20 * torch.rand(num_rows, ops.num_squares(k), device=CARD)
        factor = (x_squares.double().sum(1, keepdim=True) / k + 1e-5).rsqrt()
        sums = x.double() @ weight.T * factor + bias.double()
        for epilogue, exact in ((STORE, sums), (SILU_MUL, oracle.silu_mul(sums))):
            out = torch.full_like(exact, float("nan"), dtype=dtype)
            op(x, *matrix, bias, out, epilogue, x_squares, 1e-5)
            oracle.assert_ratio(out, exact.to(dtype), exact, plain_float32_error=1e-5)
        residual = torch.randn(num_rows, n, device=CARD).to(dtype)
        scaled = torch.full((num_rows, n), float("nan"), dtype=dtype, device=CARD)
        squares = torch.full((num_rows, ops.num_squares(n)), float("nan"), device=CARD)
        exact = residual.double() + x.double() @ weight.T + bias.double()
        op(x, *matrix, bias, residual, ADD, None, 0.0, norm_weight, scaled, squares)
        oracle.assert_ratio(residual, exact.to(dtype), exact, plain_float32_error=1e-5)
        assert torch.equal(scaled, (residual.float() * norm_weight.float()).to(dtype))
        wanted = residual.double().square().view(num_rows, -1, 16).sum(2)
        torch.testing.assert_close(squares.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[0, 3, 1, 0, 8], [0, 0, 40, 1, 0], [0, 0, 0, 0, 0]])
def test_rows_by_their_experts(counts: list[int], dtype: torch.dtype) -> None:
    """Those of linear_fp8, bit by bit, in order and out of it."""
    n, k, top_k = 192, 384, 1
    num_tokens = 48
    offsets = torch.tensor([0, *counts], device=CARD).cumsum(0).int()
    order = torch.randperm(num_tokens, device=CARD).int()
    down, gate_up = make(n, k, 128, 128, 5), make(2 * n, k, 1, k, 5)
    x = torch.randn(num_tokens, k, device=CARD).to(dtype)
    stored, activated = torch.full((2, num_tokens, n), 9.0, dtype=dtype, device=CARD)
    empty = torch.empty(0, device=CARD)
    places = torch.zeros(num_tokens, top_k, dtype=torch.int32, device=CARD)
    routing = experts.Routing(empty, empty, places, order, offsets)
    quantised.grouped_linear(x, down, routing, stored, empty)
    quantised.grouped_linear_silu_mul(x, gate_up, routing, activated, empty, empty)
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        wanted = torch.empty(end - begin, n, dtype=dtype, device=CARD)
        of_expert(down, expert, x[begin:end], wanted, STORE)
        assert torch.equal(stored[begin:end], wanted)
        of_expert(gate_up, expert, x[order[begin:end].long()], wanted, SILU_MUL)
        assert torch.equal(activated[begin:end], wanted)
    assert bool((stored[bounds[-1] :] == 9).all()) and bool((activated[bounds[-1] :] == 9).all())


def of_expert(
    matrix: quantised.Fp8Matrix, expert: int, x: Tensor, out: Tensor, epilogue: int
) -> None:
    matrix.of_expert(expert).multiply(x.contiguous(), None, out, epilogue)


def test_what_does_not_fit_is_an_error() -> None:
    matrix, x = make(64, 256, 128, 128), torch.randn(2, 256, device=CARD).bfloat16()
    out = torch.empty(2, 64, dtype=torch.bfloat16, device=CARD)
    op = torch.ops.pyserve.linear_fp8
    with pytest.raises(RuntimeError, match="the rows of x must be aligned to 16 bytes"):
        op(torch.randn(2, 260, device=CARD).bfloat16()[:, :256], *matrix, None, out)
    odd = make(64, 264, 1, 264)
    with pytest.raises(RuntimeError, match="aligned to 16 bytes, of 264 columns"):
        op(torch.randn(2, 264, device=CARD).bfloat16(), *odd, None, out)
    assert not torch.ops.pyserve.serves_linear_fp8(x[:, :8], odd.weight)
    narrow = make(64, 256, 1, 64)
    with pytest.raises(RuntimeError, match="scale_columns is 64, no multiple of 128"):
        op(x, *narrow, None, out)
