"""linear_w4a16 and dequantise_w4a16: the layout by its definition, integer by integer; the ratio
rule on odd shapes; a row's result depends on nothing but the row."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import quantised, reference, w4a16
from tests.ops import oracle

# (n, k): whole strips and units; half a strip; no multiple of 8 rows; half a unit of 64.
SHAPES = [(64, 256), (24, 128), (35, 384), (16, 96)]
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 16, 17)
SIZES = (32, 64, 128)


def shapes() -> list[tuple[int, int, int]]:
    return [(n, k, size) for n, k in SHAPES for size in SIZES if k % size == 0]


def make_packed(n: int, k: int, group_size: int, std: float = 1.0) -> Tensor:
    packed = torch.zeros(w4a16.packed_shape(n, k, group_size), dtype=torch.int32)
    w4a16.fill_with_noise(packed, n, k, std, torch.Generator().manual_seed(n + k))
    return packed


def run(x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """The op itself, whatever the number of rows, into memory that holds NaN."""
    out = torch.full((len(x), n), float("nan"), dtype=x.dtype)
    torch.ops.pyserve.linear_w4a16(x, packed, bias, out)
    return out


def by_definition(packed: Tensor, row: int, column: int) -> float:
    """One number of the matrix, by the words of ops/w4a16.py."""
    unit_words = packed.shape[2]
    group_size = {160: 32, 144: 64, 272: 128}[unit_words]
    strip, r = divmod(row, 16)
    h, g = divmod(r, 8)
    unit, in_unit = divmod(column, max(64, group_size))
    block, c = divmod(in_unit, 64)
    s, c = divmod(c, 16)
    u, c = divmod(c, 8)
    t, e = divmod(c, 2)
    words = packed[strip, unit].tolist()
    word = words[128 * block + 4 * (4 * g + t) + s] & 0xFFFFFFFF
    q = word >> 4 * (h + 2 * u + 4 * e) & 15
    num_blocks = max(1, group_size // 64)
    record = words[128 * num_blocks + 16 * (in_unit // group_size) + r] & 0xFFFFFFFF
    (scale,) = struct.unpack("f", struct.pack("I", record & ~255))
    return float((q - (record & 255)) * torch.tensor(scale))


@pytest.mark.parametrize(("n", "k", "group_size"), shapes())
def test_every_number_is_that_of_the_definition(n: int, k: int, group_size: int) -> None:
    packed = make_packed(n, k, group_size)
    rows, columns = range(0, n, 3), range(0, k, 5)
    expected = torch.tensor([[by_definition(packed, r, c) for c in columns] for r in rows])
    for dtype in oracle.DTYPES:
        out = torch.full((n, k + 3), float("nan"), dtype=dtype)
        torch.ops.pyserve.dequantise_w4a16(packed, out[:, :k])
        assert torch.equal(out[:n:3, :k:5], expected.to(dtype))
        assert bool(out[:, k:].isnan().all())
    whole = w4a16.dequantised(packed, 16 * len(packed), w4a16.unit_columns(group_size) * 6)
    assert not whole[n:].any() and not whole[:, k:].any(), "padding"


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), shapes())
def test_linear(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    packed = make_packed(n, k, group_size)
    weight = w4a16.dequantised(packed, n, k).double()
    for num_rows in ROW_COUNTS:
        torch.manual_seed(num_rows)
        x, bias = torch.randn(num_rows, k).to(dtype), torch.randn(n).to(dtype)
        for given in (bias, None):
            plain = torch.empty(num_rows, n, dtype=dtype)
            reference.linear_w4a16(x, packed, given, plain)
            exact = x.double() @ weight.T + (0 if given is None else given.double())
            errors = oracle.product_errors(x, weight)
            oracle.assert_ratio(run(x, packed, given, n), plain, exact, sum_errors=errors)


def add(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor, *norm: Tensor) -> Tensor:
    op = torch.ops.pyserve.linear_w4a16
    op(x, packed, bias, residual, 1, None, 0.0, *norm)
    return residual


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), shapes())
def test_epilogues(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """Added, activated, and with a norm before or behind: twins, and float64."""
    packed = make_packed(2 * n, k, group_size, std=0.1)
    weight = w4a16.dequantised(packed, 2 * n, k).double()
    for num_rows in (1, 3, 17):
        torch.manual_seed(num_rows)
        x, bias = torch.randn(num_rows, k).to(dtype), torch.randn(2 * n).to(dtype)
        x_squares = 20 * torch.rand(num_rows, ops.num_squares(k))
        factor = (x_squares.double().sum(1, keepdim=True) / k + 1e-5).rsqrt()
        sums, errors = x.double() @ weight.T, oracle.product_errors(x, weight)
        for given, factors in ((x_squares, factor), (None, 1.0)):
            gate_up = sums * factors + bias.double()
            of_both = oracle.silu_mul_errors(gate_up, errors * factors)
            out, plain = torch.full((2, num_rows, n), float("nan"), dtype=dtype)
            torch.ops.pyserve.linear_w4a16(x, packed, bias, out, 2, given, 1e-5)
            reference.linear_w4a16(x, packed, bias, plain, 2, given, 1e-5)
            oracle.assert_ratio(out, plain, oracle.silu_mul(gate_up), sum_errors=of_both)
            if given is not None:
                out, plain = torch.full((2, num_rows, 2 * n), float("nan"), dtype=dtype)
                torch.ops.pyserve.linear_w4a16(x, packed, None, out, 0, given, 1e-5)
                reference.linear_w4a16(x, packed, None, plain, 0, given, 1e-5)
                oracle.assert_ratio(out, plain, sums * factors, sum_errors=errors * factors)
        residual, norm_weight = torch.randn(num_rows, 2 * n).to(dtype), torch.randn(2 * n).to(dtype)
        exact = residual.double() + sums + bias.double()
        plain = residual.clone()
        reference.linear_w4a16(x, packed, bias, plain, 1)
        alone = add(x, packed, bias, residual.clone())
        oracle.assert_ratio(alone, plain, exact, sum_errors=errors)
        scaled = torch.full((num_rows, 2 * n), float("nan"), dtype=dtype)
        squares = torch.full((num_rows, ops.num_squares(2 * n)), float("nan"))
        assert torch.equal(
            add(x, packed, bias, residual.clone(), norm_weight, scaled, squares), alone
        )
        assert torch.equal(scaled, (alone.float() * norm_weight.float()).to(dtype))
        padded = torch.nn.functional.pad(alone.double().square(), (0, -2 * n % 16))
        wanted = padded.view(num_rows, -1, 16).sum(2)
        torch.testing.assert_close(squares.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), shapes())
def test_basis_vectors(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """Of a column of the identity comes a column of the matrix, exactly."""
    packed = make_packed(n, k, group_size)
    weight = w4a16.dequantised(packed, n, k)
    assert torch.equal(run(torch.eye(k, dtype=dtype), packed, None, n), weight.T.to(dtype))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_row_does_not_depend_on_its_batch_mates(dtype: torch.dtype) -> None:
    n, k = 35, 384
    for group_size in SIZES:
        packed = make_packed(n, k, group_size)
        x = torch.randn(17, k).to(dtype)
        together = run(x, packed, None, n)
        for num_rows in ROW_COUNTS:
            assert torch.equal(run(x[:num_rows], packed, None, n), together[:num_rows])
            assert torch.equal(run(x[-num_rows:], packed, None, n), together[-num_rows:])
        x[3, 0], x[11, 1] = float("nan"), float("inf")
        result = run(x, packed, None, n)
        assert bool(result[3].isnan().all()) and not bool(result[11].isfinite().all())
        others = [row for row in range(17) if row not in (3, 11)]
        assert torch.equal(result[others], together[others])


def test_the_number_of_threads_changes_nothing() -> None:
    packed = make_packed(2050, 512, 128)
    num_threads = torch.get_num_threads()
    x = torch.randn(5, 512)
    results, plain = [], torch.empty(3, 2050, 512)
    try:
        for i in range(3):
            torch.set_num_threads(i + 1)
            results.append(run(x, packed, None, 2050))
            torch.ops.pyserve.dequantise_w4a16(packed, plain[i])
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain[0], plain[2])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("num_rows", [1, 8, 9, 40, 130])
def test_many_rows_by_slices_of_plain_numbers(num_rows: int, dtype: torch.dtype) -> None:
    n, k = 88, 256
    packed = make_packed(n, k, 128)
    weight = w4a16.dequantised(packed, n, k).double()
    torch.manual_seed(0)
    x, bias = torch.randn(num_rows, k).to(dtype), torch.randn(n).to(dtype)
    for given, num_columns in ((bias, 16 * k), (None, 40 * k), (bias, 96 * k)):
        wide = torch.full((num_rows, n + 5), float("nan"), dtype=dtype)
        scratch = torch.full((num_columns,), float("nan"), dtype=dtype)
        quantised.linear(x, quantised.W4A16Matrix(packed), given, wide[:, :n], scratch)
        plain = torch.nn.functional.linear(x, weight.to(dtype), None if given is None else given)
        exact = x.double() @ weight.T + (0 if given is None else given.double())
        oracle.assert_ratio(wide[:, :n], plain, exact, plain_float32_error=1e-2)
        assert bool(wide[:, n:].isnan().all())


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("num_rows", [8, 40])
def test_epilogues_by_slices_of_plain_numbers(num_rows: int, dtype: torch.dtype) -> None:
    """And by the op, where it serves so few rows."""
    n, k = 88, 256
    packed = make_packed(n, k, 128, std=0.1)
    weight = w4a16.dequantised(packed, n, k).double()
    torch.manual_seed(0)
    x, bias = torch.randn(num_rows, k).to(dtype), torch.randn(n).to(dtype)
    scratch = torch.full((40 * k,), float("nan"), dtype=dtype)
    sums = x.double() @ weight.T + bias.double()
    rounded = torch.nn.functional.linear(x, weight.to(dtype), bias)
    wide = torch.randn(num_rows, n + 5).to(dtype)
    exact, plain = wide[:, :n].double() + sums, wide[:, :n] + rounded
    behind = wide[:, n:].clone()
    matrix = quantised.W4A16Matrix(packed)
    quantised.linear_add(x, matrix, bias, wide[:, :n], scratch)
    oracle.assert_ratio(wide[:, :n], plain, exact, plain_float32_error=2e-2)
    assert torch.equal(wide[:, n:], behind)
    out, gate_up = torch.empty(num_rows, n // 2, dtype=dtype), torch.empty(num_rows, n, dtype=dtype)
    quantised.linear_silu_mul(x, matrix, bias, out, gate_up, scratch)
    plain = ops.silu_mul(rounded)
    oracle.assert_ratio(out, plain, oracle.silu_mul(sums), plain_float32_error=2e-2)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_strided_rows(dtype: torch.dtype) -> None:
    packed = make_packed(24, 128, 64)
    wide = torch.randn(7, 140).to(dtype)
    out = torch.full((7, 30), float("nan"), dtype=dtype)
    torch.ops.pyserve.linear_w4a16(wide[:, 4:132], packed, None, out[:, 2:26])
    assert torch.equal(out[:, 2:26], run(wide[:, 4:132].contiguous(), packed, None, 24))
    assert bool(out[:, :2].isnan().all()) and bool(out[:, 26:].isnan().all())


def test_what_does_not_fit_is_an_error() -> None:
    packed, x, out = make_packed(24, 128, 64), torch.randn(2, 128), torch.empty(2, 24)
    op = torch.ops.pyserve.linear_w4a16
    for args, words in [
        ((x[:, :64], packed, None, out), "packed has 2 strips of 2 units"),
        ((x, packed, None, torch.empty(2, 40)), "40 rows by 128 columns in groups of 64"),
        ((x, packed[:, :, :100].contiguous(), None, out), "size 2 of packed is 100"),
        ((x, packed.transpose(0, 1), None, out), "must be contiguous"),
        ((x, packed.float(), None, out), "packed must be Int"),
        ((x, packed, torch.ones(23), out), "size 0 of bias is 23"),
        ((x, packed, None, out.bfloat16()), "out is BFloat16"),
        ((torch.randn(2, 100), packed, None, out), "100 columns are no multiple of the 64"),
        ((x, packed, None, out, 3), "epilogue is 3, not 0, 1 or 2"),
        ((x, packed, None, out, 2), "packed has 2 strips of 2 units, which are not those of 48"),
        ((x, packed, None, out[:1], 1), "size 0 of residual is 1"),
        ((x, packed, None, out, 1, torch.ones(2, 8)), "x_squares do not go with an addition"),
        ((x, packed, None, out, 0, None, 0.0, torch.ones(24)), "norm_weight goes with an addition"),
        (
            (x, packed, None, out, 1, None, 0.0, torch.ones(24)),
            "norm_weight, scaled and squares go together",
        ),
    ]:
        with pytest.raises(RuntimeError, match=words):
            op(*args)
    with pytest.raises(RuntimeError, match="packed has 2 strips"):
        torch.ops.pyserve.dequantise_w4a16(packed, torch.empty(40, 128))


def test_no_rows() -> None:
    packed = make_packed(24, 128, 64)
    assert run(torch.empty(0, 128), packed, None, 24).shape == (0, 24)


def test_words_are_packed_integers_and_their_transpose_those_of_the_transpose() -> None:
    codes = torch.randint(0, 16, (40, 64), dtype=torch.uint8)
    words = w4a16.words_of(codes)
    assert torch.equal(w4a16.codes_of(words), codes)
    assert torch.equal(w4a16.codes_of(w4a16.transposed(words)), codes.t())


def test_parts_come_in_any_order() -> None:
    """Rows that do not begin strips, units of columns, scales before integers."""
    n, k, group_size = 56, 256, 64
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales, zeros = torch.rand(n, 4).half(), torch.randint(0, 16, (n, 4))
    packed = torch.zeros(w4a16.packed_shape(n, k, group_size), dtype=torch.int32)
    for begin, end in ((40, 56), (0, 19), (19, 40)):
        w4a16.add_scales(packed, begin, 0, scales[begin:end])
        for column in (128, 0):
            words = w4a16.words_of(codes[begin:end, column : column + 128])
            w4a16.add_words(packed, begin, column, words)
    w4a16.add_zeros(packed, 0, 2, zeros[:, 2:])
    w4a16.add_zeros(packed, 0, 0, zeros[:, :2])
    differences = codes.float().view(n, 4, 64) - zeros[..., None]
    expected = (differences * scales.float()[..., None]).view(n, k)
    assert torch.equal(w4a16.dequantised(packed, n, k), expected)


def test_scales_of_16_bits_are_kept_whole_and_those_of_32_rounded() -> None:
    packed = torch.zeros(w4a16.packed_shape(16, 64, 64), dtype=torch.int32)
    w4a16.add_words(packed, 0, 0, w4a16.words_of(torch.ones(16, 64, dtype=torch.uint8)))
    halves = torch.arange(1, 17, dtype=torch.int16).mul(1900).view(torch.float16)  # denormal too
    w4a16.add_scales(packed, 0, 0, halves[:, None])
    assert torch.equal(w4a16.dequantised(packed, 16, 64)[:, 0], halves.float())
    packed = torch.zeros_like(packed)
    w4a16.add_words(packed, 0, 0, w4a16.words_of(torch.ones(16, 64, dtype=torch.uint8)))
    floats = torch.rand(16) + 0.5
    w4a16.add_scales(packed, 0, 0, floats[:, None])
    torch.testing.assert_close(w4a16.dequantised(packed, 16, 64)[:, 0], floats, rtol=2**-16, atol=0)


@pytest.mark.parametrize("group_size", SIZES)
def test_rounding_is_to_the_nearest_of_16_steps(group_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 256)
    weight[1] = weight[1].abs() + 1
    weight[2] = 0
    codes, scales, zeros = w4a16.quantised(weight, group_size)
    difference = codes.float().view(5, -1, group_size) - zeros[..., None].float()
    found = (difference * scales[..., None]).view(5, 256)
    step = scales.repeat_interleave(group_size, 1)
    assert bool(((found - weight).abs() <= 1.01 * step)[1:2].all())
    assert float(((found - weight).abs() / step).mean()) < 0.3
    assert not found[2].any(), "zero is one of the steps"
