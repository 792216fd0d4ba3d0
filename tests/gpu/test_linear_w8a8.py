"""linear_w8a8 on a card with matrix units of 8 bits: rows as they are rounded, bit by bit; sums
that are exact; others within what the units keep of them; rows that look at no others. What the
kernels do is held on a CPU too: tests/ops/gemm_w8a8.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bench.w8a8 import TILINGS
from pyserve.ops import fp8, quantised, reference
from tests.gpu.test_linear_fp8 import make
from tests.ops import oracle

CARD = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
STORE, ADD, SILU_MUL = range(3)  # Epilogue in cuda/common/epilogue.h
# n, k, rows and columns of a scale: blocks, halves of them, rows, the matrix; odd sizes.
SHAPES = [(64, 64, 128, 128), (320, 832, 128, 128), (24, 400, 1, 400), (192, 1984, 64, 128),
          (4096, 4096, 128, 128), (576, 14336, 1, 14336), (200, 256, 200, 256)]  # fmt: skip

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="other cards have no kernel for it",
)


@pytest.fixture
def switch() -> Iterator[Callable[[int, int], None]]:
    """Rows from which it is taken, and the tiling, 0 by estimate, until the test ends."""
    weight = make(64, 256, 128, 128).weight

    def to(min_rows: int, tiling: int) -> None:
        torch.ops.pyserve.try_linear_w8a8(weight, min_rows, tiling)
        quantised._served.clear()

    yield to
    to(-1, -1)


def scratch_for(x: Tensor, num_rows: int | None = None) -> Tensor:
    m, k = x.shape
    row_bytes = k + 4 * (-(-k // fp8.GROUP_COLUMNS))
    size = -(-row_bytes * (num_rows or m) // 2)
    return torch.full((size,), float("nan"), dtype=x.dtype, device=CARD)


def run(
    x: Tensor, matrix: quantised.Fp8Matrix, bias: Tensor | None, before: Tensor | None = None,
    epilogue: int = STORE,
) -> Tensor:  # fmt: skip
    """Added to `before` where it is given."""
    n = len(matrix.weight) // (2 if epilogue == SILU_MUL else 1)
    out = torch.full((len(x), n), float("nan"), dtype=x.dtype, device=CARD)
    if before is not None:
        out.copy_(before)
        epilogue = ADD
    torch.ops.pyserve.linear_w8a8(x, *matrix, bias, out, scratch_for(x), epilogue)
    return out


def check(
    out: Tensor, x: Tensor, matrix: quantised.Fp8Matrix, bias: Tensor | None,
    before: Tensor | None = None, epilogue: int = STORE,
) -> None:  # fmt: skip
    """Against float64 of x rounded: the error of the twin twice, and what the units lose: each of
    the four products of a block leaves some 13 bits of the sum so far."""
    rounded, scales = fp8.rounded_rows(x)
    weight = fp8.dequantised(*matrix).double()
    numbers = fp8.dequantised(rounded, scales.T, 1, fp8.GROUP_COLUMNS).double()
    exact = numbers @ weight.T + (0 if bias is None else bias.double())
    twin = torch.empty_like(out)
    if epilogue == SILU_MUL:
        exact = oracle.silu_mul(exact)
    if before is not None:
        exact += before.double()
        twin.copy_(before)
        epilogue = ADD
    reference.linear_w8a8(x, *matrix, bias, twin, torch.empty(0), epilogue)
    largest = exact.abs().max()
    allowed = 2 * (twin.double() - exact).abs().max() + 2**-11 * largest
    error = (out.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(17, 64), (33, 400), (130, 4096)])
def test_rows_are_rounded_as_the_twin_does(m: int, k: int, dtype: torch.dtype) -> None:
    wide = torch.randn(m, k + 8, device=CARD).to(dtype)
    x = wide[:, :k]
    x[3], x[5, : k // 2], x[7, 9], x[8] = 0, 1e-7, 60000, x[8] * 100
    matrix = make(64, k, 1, k)
    out = torch.empty(m, 64, dtype=dtype, device=CARD)
    scratch = scratch_for(x)
    torch.ops.pyserve.linear_w8a8(x, *matrix, None, out, scratch)
    rounded, scales = fp8.rounded_rows(x)
    held = scratch.view(torch.uint8)
    assert torch.equal(held[: m * k].view(m, k), rounded)
    assert torch.equal(held[m * k : m * k + scales.nbytes].view(torch.float32), scales.flatten())


def exact_case(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, quantised.Fp8Matrix]:
    """Small integers whose scales are powers of 2: nothing is rounded but the result."""
    generator = torch.Generator(CARD).manual_seed(m + n + k)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        drawn = torch.randint(low, high + 1, shape, device=CARD, generator=generator)
        return drawn.float()

    x = integers(-1, 1, m, k)
    for begin in range(0, k, 128):
        places = torch.randint(begin, min(k, begin + 128), (m,), device=CARD, generator=generator)
        x[torch.arange(m, device=CARD), places] = 448
    weight = integers(-8, 8, n, k).to(fp8.E4M3).view(torch.uint8)
    scales = 2 ** integers(-6, -4, -(-n // 128), -(-k // 128))
    return x.to(dtype), quantised.Fp8Matrix(weight, scales, 128, 128)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_are_exact(dtype: torch.dtype, switch: Callable[[int, int], None]) -> None:
    """By each tiling: every place of every row and column counts once."""
    m, n, k = 300, 576, 1088
    x, matrix = exact_case(m, n, k, dtype)
    exact = x.double() @ fp8.dequantised(*matrix).double().T
    for number in range(1, len(TILINGS) + 1):
        switch(-1, number)
        assert torch.equal(run(x, matrix, None), exact.to(dtype)), number


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """All layouts of scales, with a bias or without, with each epilogue, by what is estimated to be
    the fastest."""
    n, k, *_ = shape
    matrix = make(*shape)
    gate_up = make(2 * n, k, *shape[2:]) if n % 64 == 0 else None
    gate_up_bias = torch.randn(2 * n, device=CARD).to(dtype)
    bias = torch.randn(n, device=CARD).to(dtype)
    x = torch.randn(700, k, device=CARD).to(dtype)
    whole = run(x, matrix, bias)
    check(whole, x, matrix, bias)
    for num_rows in (1, 17, 31, 64, 65, 128, 200, 513):
        check(run(x[:num_rows], matrix, bias), x[:num_rows], matrix, bias)
        if gate_up is not None:
            out = run(x[:num_rows], gate_up, gate_up_bias, epilogue=SILU_MUL)
            check(out, x[:num_rows], gate_up, gate_up_bias, epilogue=SILU_MUL)
        before = torch.randn(num_rows, n, device=CARD).to(dtype)
        added = run(x[:num_rows], matrix, None, before)
        check(added, x[:num_rows], matrix, None, before)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9600, 1152, 128, 128), (832, 1088, 1, 1088)])
def test_every_tiling(
    shape: tuple[int, int, int, int], dtype: torch.dtype, switch: Callable[[int, int], None]
) -> None:
    """Several tiles a cluster, mates and none; the same bits from all that divide nothing, twice,
    and of a part of the rows."""
    n, k, *_ = shape
    matrix = make(*shape)
    x, bias = torch.randn(1030, k, device=CARD).to(dtype), torch.randn(n, device=CARD).to(dtype)
    switch(-1, 1)
    first, activated = run(x, matrix, bias), run(x, matrix, bias, epilogue=SILU_MUL)
    check(first, x, matrix, bias)
    check(activated, x, matrix, bias, epilogue=SILU_MUL)
    for number, (*_, parts) in enumerate(TILINGS, 1):
        switch(-1, number)
        for num_rows in (1030, 1030, 33):
            if parts == 1:
                both = first[:num_rows], activated[:num_rows]
                assert torch.equal(run(x[:num_rows], matrix, bias), both[0]), number
                half = run(x[:num_rows], matrix, bias, epilogue=SILU_MUL)
                assert torch.equal(half, both[1]), number
        if parts > 1:
            out = run(x, matrix, bias)
            check(out, x, matrix, bias)
            assert torch.equal(out, run(x, matrix, bias)), number


@pytest.mark.parametrize("num_rows", [2048, 8192])
def test_a_long_prompt(num_rows: int) -> None:
    matrix = make(4096, 4096, 128, 128)
    x = torch.randn(num_rows, 4096, device=CARD).bfloat16()
    check(run(x, matrix, None), x, matrix, None)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_and_strides(dtype: torch.dtype) -> None:
    """Scratch for some rows at a time; rows of x and of out that lie apart; a row of NaN."""
    n, k, m = 320, 832, 150
    matrix = make(n, k, 128, 128)
    x = torch.randn(m, k, device=CARD).to(dtype)
    wanted = run(x, matrix, None)
    wide = torch.full((m, k + 8), float("nan"), dtype=dtype, device=CARD)
    wide[:, :k] = x
    for num_rows in (1, 40, 149):
        out = torch.full((m + 2, n + 8), 9.0, dtype=dtype, device=CARD)
        scratch = scratch_for(x, num_rows)
        torch.ops.pyserve.linear_w8a8(wide[:, :k], *matrix, None, out[:m, :n], scratch)
        assert torch.equal(out[:m, :n], wanted)
        assert bool((out[m:] == 9).all()) and bool((out[:, n:] == 9).all())
    x[11, 200] = float("nan")
    out = run(x, matrix, None)
    assert bool(out[11].isnan().all())
    others = [row for row in range(m) if row != 11]
    assert torch.equal(out[others], wanted[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [16, 17, 300])
def test_it_is_taken_from_so_many_rows_on(
    num_rows: int, dtype: torch.dtype, switch: Callable[[int, int], None]
) -> None:
    """With each epilogue."""
    n, k = 384, 832
    matrix = make(n, k, 128, 128)
    x, bias = torch.randn(num_rows, k, device=CARD).to(dtype), torch.randn(n, device=CARD).to(dtype)
    scratch = torch.full((256 * k,), float("nan"), dtype=dtype, device=CARD)
    switch(17, 0)
    assert quantised.first_rounded_row(CARD) == 17
    assert matrix.is_rounding(x) == (num_rows >= 17) and matrix.is_own(x) == (num_rows < 17)
    out = torch.full((num_rows, n), float("nan"), dtype=dtype, device=CARD)
    half, gate_up = torch.empty_like(out)[:, : n // 2].contiguous(), torch.empty_like(out)
    before = torch.randn(num_rows, n, device=CARD).to(dtype)
    added = before.clone()
    quantised.linear(x, matrix, bias, out, scratch)
    quantised.linear_add(x, matrix, None, added, scratch)
    quantised.linear_silu_mul(x, matrix, bias, half, gate_up, scratch)
    if num_rows >= 17:
        assert torch.equal(out, run(x, matrix, bias))
        assert torch.equal(added, run(x, matrix, None, before))
        assert torch.equal(half, run(x, matrix, bias, epilogue=SILU_MUL))
    else:
        weight = fp8.dequantised(*matrix)
        plain = torch.nn.functional.linear(x, weight.to(dtype), bias)
        exact = x.double() @ weight.double().T + bias.double()
        oracle.assert_ratio(out, plain, exact, plain_float32_error=1e-2)


def test_no_rows_and_what_does_not_fit() -> None:
    matrix, x = make(64, 256, 128, 128), torch.randn(20, 256, device=CARD).bfloat16()
    out, scratch = torch.empty(20, 64, dtype=x.dtype, device=CARD), scratch_for(x)
    op, serves = torch.ops.pyserve.linear_w8a8, torch.ops.pyserve.serves_linear_w8a8
    op(x[:0], *matrix, None, out[:0], scratch)
    with pytest.raises(RuntimeError, match="scratch has 4 bytes, a row takes 264"):
        op(x, *matrix, None, out, scratch[:2])
    with pytest.raises(RuntimeError, match="of 64 by 256 with scales of 8 by 128"):
        op(x, *make(64, 256, 8, 128), None, out, scratch)
    with pytest.raises(RuntimeError, match="of 32 by 256 with scales of 128 by 128"):
        op(x, *matrix, None, out[:, :32], scratch, SILU_MUL)
    switch = torch.ops.pyserve.try_linear_w8a8
    switch(matrix.weight, 17)
    try:
        assert serves(matrix.weight, 17, 128, 128) and not serves(matrix.weight, 16, 128, 128)
        assert serves(matrix.weight, 17, 1, 256) and not serves(matrix.weight, 17, 8, 128)
    finally:
        switch(matrix.weight, -1)
    with pytest.raises(RuntimeError, match="min_rows is -2, at least -1"):
        switch(matrix.weight, -2)
    with pytest.raises(RuntimeError, match="tiling is 10, from -1 to 9"):
        switch(matrix.weight, -1, 10)
