"""linear, linear_add and linear_silu_mul: ratio rule on odd shapes; a row's result depends on
nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pyserve import ops
from pyserve.ops import reference, toolchain
from tests.ops import oracle

ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 64)
# (n, k): whole tiles of AMX; a last panel that overlaps; neither n nor k a multiple of anything.
SHAPES = [(64, 64), (16, 32), (130, 96), (77, 256), (512, 256), (1, 1), (3, 7), (33, 50), (99, 259)]
OPS = ("linear", "linear_add", "linear_silu_mul")
FEW_ROWS = {torch.bfloat16: 64, torch.float32: 16}  # that are served on every CPU


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, op: str = "linear") -> Tensor:
    """The op itself, whatever the number of rows, into memory that holds NaN, or `residual`."""
    n = len(weight) // 2 if op == "linear_silu_mul" else len(weight)
    out = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype)
    if op == "linear_add":
        out = residual(len(x), n, x.dtype)
    getattr(torch.ops.pyserve, op)(x, weight, bias, out)
    return out


def residual(num_rows: int, n: int, dtype: torch.dtype) -> Tensor:
    """Equal rows, so that tests of rows that move see the same in all."""
    torch.manual_seed(n)
    return (3 * torch.randn(n)).to(dtype).repeat(num_rows, 1)


def make(
    num_rows: int, n: int, k: int, dtype: torch.dtype, seed: int = 0, op: str = "linear"
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    n = 2 * n if op == "linear_silu_mul" else n
    x, weight, bias = (torch.randn(shape) for shape in [(num_rows, k), (n, k), (n,)])
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


def sum_errors(x: Tensor, weight: Tensor, bias: Tensor | None, op: str) -> Tensor:
    """How far float32 sums may be from `exact`."""
    errors = oracle.product_errors(x, weight)
    if op != "linear_silu_mul":
        return errors
    return oracle.silu_mul_errors(product(x, weight, bias), errors)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, op: str) -> Tensor:
    sums = product(x, weight, bias)
    if op == "linear_add":
        return residual(len(x), sums.shape[1], x.dtype).double() + sums
    return oracle.silu_mul(sums) if op == "linear_silu_mul" else sums


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(n: int, k: int, dtype: torch.dtype, op: str) -> None:
    for num_rows in ROW_COUNTS:
        x, weight, bias = make(num_rows, n, k, dtype, seed=num_rows, op=op)
        for given in (bias, None):
            plain = residual(num_rows, n, dtype)
            getattr(reference, op)(x, weight, given, plain)
            exactly, errors = (meant(x, weight, given, op) for meant in (exact, sum_errors))
            oracle.assert_ratio(run(x, weight, given, op), plain, exactly, sum_errors=errors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_does_not_depend_on_its_batch_mates(
    n: int, k: int, dtype: torch.dtype, op: str
) -> None:
    x, weight, bias = make(max(ROW_COUNTS), n, k, dtype, op=op)
    together = run(x, weight, bias, op)
    for num_rows in ROW_COUNTS:
        assert torch.equal(run(x[:num_rows], weight, bias, op), together[:num_rows])
        assert torch.equal(run(x[-num_rows:], weight, bias, op), together[-num_rows:])


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_an_epilogue_takes_the_sums_that_linear_stores(n: int, k: int) -> None:
    """At float32, where linear rounds nothing: so fused and plain give the same model."""
    x, weight, bias = make(5, n, k, torch.float32)
    expected = residual(5, n, torch.float32) + run(x, weight, bias)
    assert torch.equal(run(x, weight, bias, "linear_add"), expected)
    x, weight, bias = make(5, n, k, torch.float32, op="linear_silu_mul")
    expected = ops.silu_mul(run(x, weight, bias))
    assert torch.equal(run(x, weight, bias, "linear_silu_mul"), expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype, op: str) -> None:
    x, weight, bias = make(33, 2050, 512, dtype, op=op)
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x, weight, bias, op))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_strided_rows(dtype: torch.dtype, op: str) -> None:
    x, weight, bias = make(19, 96, 128, dtype, op=op)
    expected = run(x[:, 32:96].contiguous(), weight[:, 64:].contiguous(), bias, op)
    wide = torch.full((19, 100), float("nan"), dtype=dtype)
    out = wide[:, 2:98]
    if op == "linear_add":
        out.copy_(residual(19, 96, dtype))
    getattr(torch.ops.pyserve, op)(x[:, 32:96], weight[:, 64:], bias, out)
    assert torch.equal(out, expected)
    assert bool(wide[:, :2].isnan().all()) and bool(wide[:, 98:].isnan().all())
    # Every other row, from the last to the first of them.
    assert torch.equal(run(x[::2, 32:96], weight[:, 64:], bias, op), expected[::2])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (33, 50)])
def test_a_row_of_nan_or_inf_stays_alone(n: int, k: int, dtype: torch.dtype, op: str) -> None:
    x, weight, bias = make(20, n, k, dtype, op=op)
    expected = run(x, weight, bias, op)
    x[3, 0], x[17, 1] = float("nan"), float("inf")
    result = run(x, weight, bias, op)
    assert bool(result[3].isnan().all())
    if op != "linear_silu_mul":  # there -inf may become 0
        assert not bool(result[17].isfinite().any())
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_no_rows_no_columns_nothing_to_sum(dtype: torch.dtype) -> None:
    for op in OPS:
        weight = torch.ones(16, 32, dtype=dtype)
        n = 8 if op == "linear_silu_mul" else 16
        assert run(torch.empty(0, 32, dtype=dtype), weight, op=op).shape == (0, n)
        nothing = run(torch.ones(2, 32, dtype=dtype), torch.empty(0, 32, dtype=dtype), op=op)
        assert nothing.shape == (2, 0)
    bias = torch.arange(16).to(dtype)
    x, weight = torch.empty(2, 0, dtype=dtype), torch.empty(16, 0, dtype=dtype)
    assert torch.equal(run(x, weight, bias), bias.expand(2, 16))
    assert torch.equal(run(x, weight, bias, "linear_add"), residual(2, 16, dtype) + bias)


def is_served(weight: Tensor, num_rows: int) -> bool:
    return bool(torch.ops.pyserve.serves_linear(weight, num_rows, 0))


@pytest.mark.parametrize(("dtype", "few"), FEW_ROWS.items())
def test_what_is_not_served_is_torch_s(dtype: torch.dtype, few: int) -> None:
    """Many rows are, in float32, and in bfloat16 on a CPU that has products of it."""
    for num_rows in (1, few, few + 1, 5 * few):
        x, weight, bias = make(num_rows, 48, 96, dtype)
        is_own = is_served(weight, num_rows)
        assert is_own or num_rows > few
        assert dtype == torch.bfloat16 or is_own == (num_rows <= few)
        for given in (bias, None):
            expected = run(x, weight, given) if is_own else functional.linear(x, weight, given)
            assert torch.equal(ops.linear(x, weight, given), expected)
            out = torch.full_like(expected, torch.nan)
            assert ops.linear(x, weight, given, out) is out and torch.equal(out, expected)


def test_a_cpu_that_torch_has_nothing_fast_for_is_served() -> None:
    flags = set(toolchain.cpu_identity().split())
    if "avx512f" in flags and "avx512_bf16" not in flags:
        assert is_served(torch.empty(8, 8, dtype=torch.bfloat16), 10_000)
    if "amx_bf16" in flags or "avx512_bf16" in flags:
        assert not is_served(torch.empty(8, 8, dtype=torch.bfloat16), 65)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_few_rows_are_one_call_and_many_are_torch_s(dtype: torch.dtype, has_bias: bool) -> None:
    few = FEW_ROWS[dtype]
    for num_rows in (1, few, few + 1, 4 * few):
        x, weight, bias = make(num_rows, 48, 96, dtype)
        given = bias if has_bias else None
        # The composition of plain torch, each step of it rounded.
        plain = residual(num_rows, 48, dtype) + functional.linear(x, weight, given)
        out = residual(num_rows, 48, dtype)
        ops.linear_add(x, weight, given, out)
        oracle.assert_ratio(
            out, plain, exact(x, weight, given, "linear_add"), plain_float32_error=1e-2
        )
        if is_served(weight, num_rows):
            assert torch.equal(out, run(x, weight, given, "linear_add"))
        x, weight, bias = make(num_rows, 48, 96, dtype, op="linear_silu_mul")
        given = bias if has_bias else None
        out, gate_up = torch.full((2, num_rows, 96), torch.nan, dtype=dtype)
        out = out[:, :48]
        ops.linear_silu_mul(x, weight, given, out, gate_up)
        plain = ops.silu_mul(functional.linear(x, weight, given))
        oracle.assert_ratio(
            out, plain, exact(x, weight, given, "linear_silu_mul"), plain_float32_error=1e-2
        )
        if is_served(weight, num_rows):
            assert torch.equal(out, run(x, weight, given, "linear_silu_mul"))
            assert bool(gate_up.isnan().all())


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
    with pytest.raises(RuntimeError, match="size 1 of residual is 3, expected 4"):
        torch.ops.pyserve.linear_add(x, weight, None, torch.empty(2, 3))
    with pytest.raises(RuntimeError, match="linear_add: residual is BFloat16, x is Float"):
        torch.ops.pyserve.linear_add(x, weight, None, torch.empty(2, 4).bfloat16())
    with pytest.raises(RuntimeError, match="linear_silu_mul: size 0 of weight is 4, expected 8"):
        torch.ops.pyserve.linear_silu_mul(x, weight, None, torch.empty(2, 4))
    with pytest.raises(RuntimeError, match="size 0 of bias is 2, expected 4"):
        torch.ops.pyserve.linear_silu_mul(x, weight, bias[:2], torch.empty(2, 2))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (64, 64), (130, 96), (33, 50), (7, 9), (520, 256)])
def test_a_norm_between_two_linears_may_be_a_factor(n: int, k: int, dtype: torch.dtype) -> None:
    """The first adds to the residual of n columns, the second multiplies its norm."""
    eps = 1e-5
    x, weight, bias = make(8, n, k, dtype)
    norm_weight = 1 + torch.randn(n, device=x.device).to(dtype) / 4
    for num_rows in (1, 2, 3, 5, 8):
        given = residual(8, n, dtype)[:num_rows].contiguous()
        torch.ops.pyserve.linear_add(x[:num_rows], weight, bias, given)
        added = residual(8, n, dtype)[:num_rows].contiguous()
        wide = torch.full((num_rows, n + 8), torch.nan, dtype=dtype, device=x.device)
        squares = torch.full((num_rows, ops.num_squares(n)), torch.nan, device=x.device)
        ops.linear_add_for_norm(
            x[:num_rows], weight, bias, added, norm_weight, wide[:, :n], squares
        )
        assert torch.equal(added, given), "the residual is what it is without a norm"
        assert torch.equal(wide[:, :n], (added.float() * norm_weight.float()).to(dtype))
        assert bool(wide[:, n:].isnan().all())
        mean = added.double().square().mean(1, keepdim=True)
        torch.testing.assert_close(squares.double().sum(1, keepdim=True) / n, mean)
        normed = wide[:, :n].double() / (mean + eps).sqrt()
        for op, width in (("linear", 40), ("linear_silu_mul", 20)):
            torch.manual_seed(1)
            second = (torch.randn(40, n, device=x.device) / n**0.5).to(dtype)
            second_bias = torch.randn(40, device=x.device).to(dtype)
            sums = normed @ second.double().T + second_bias.double()
            wanted = oracle.silu_mul(sums) if op == "linear_silu_mul" else sums
            out = torch.full((num_rows, width), torch.nan, dtype=dtype, device=x.device)
            call = ops.linear_of_scaled if op == "linear" else ops.linear_silu_mul_of_scaled
            call(wide[:, :n], second, second_bias, out, squares, eps)
            oracle.assert_ratio(out, wanted.to(dtype), wanted, plain_float32_error=3e-6)


def test_refusals_of_norms() -> None:
    x, weight, _ = make(2, 24, 8, oracle.DTYPES[0])
    out, squares = run(x, weight), torch.ones(2, 1, device=x.device)
    with pytest.raises(RuntimeError, match="size 1 of x_squares is 2, expected 1"):
        torch.ops.pyserve.linear(x, weight, None, out, squares.expand(2, 2).contiguous(), 1e-5)
    with pytest.raises(RuntimeError, match="x_squares must be Float, got Int"):
        torch.ops.pyserve.linear(x, weight, None, out, squares.int(), 1e-5)
    with pytest.raises(RuntimeError, match="norm_weight, scaled and squares go together"):
        torch.ops.pyserve.linear_add(x, weight, None, out, weight[:, 0].contiguous())
    with pytest.raises(RuntimeError, match="size 1 of squares is 1, expected 2"):
        ops.linear_add_for_norm(x, weight, None, out, weight[:, 0].contiguous(), out + 1, squares)
