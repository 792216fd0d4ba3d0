"""linear, linear_add and linear_silu_mul on CUDA: ratio rule on odd shapes; a row's result depends
on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle

DTYPES = (torch.bfloat16, torch.float16)
OPS = ("linear", "linear_add", "linear_silu_mul")
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33)
# (n, k): sizes of models; tails of n and k; few long rows; k not a multiple of 8 (plain kernel).
SHAPES = [
    (4096, 4096),
    (512, 14336),
    (3001, 3584),
    (2117, 72),
    (16, 8),
    (1, 5120),
    (130, 1032),
    (1, 1),
    (3, 7),
    (33, 50),
    (99, 259),
]


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, op: str = "linear") -> Tensor:
    """The op itself, whatever the number of rows, into memory that holds NaN, or `residual`."""
    n = len(weight) // 2 if op == "linear_silu_mul" else len(weight)
    out = torch.full((x.shape[0], n), float("nan"), dtype=x.dtype, device="cuda")
    if op == "linear_add":
        out = residual(len(x), n, x.dtype)
    getattr(torch.ops.pyserve, op)(x, weight, bias, out)
    return out


def residual(num_rows: int, n: int, dtype: torch.dtype) -> Tensor:
    """Equal rows, so that tests of rows that move see the same in all."""
    torch.manual_seed(n)
    return (3 * torch.randn(n, device="cuda")).to(dtype).repeat(num_rows, 1)


def make(
    num_rows: int, n: int, k: int, dtype: torch.dtype, op: str = "linear"
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + k)
    n = 2 * n if op == "linear_silu_mul" else n
    x, weight, bias = (
        torch.randn(shape, device="cuda").to(dtype) for shape in [(num_rows, k), (n, k), (n,)]
    )
    # Sums of the size that a model's have: a product of two may not leave float16.
    return x, weight / 8 if op == "linear_silu_mul" else weight, bias


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, op: str) -> Tensor:
    sums = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if op == "linear_add":
        return residual(len(x), sums.shape[1], x.dtype).double() + sums
    return oracle.silu_mul(sums) if op == "linear_silu_mul" else sums


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(n: int, k: int, dtype: torch.dtype, op: str) -> None:
    x, weight, bias = make(max(ROW_COUNTS), n, k, dtype, op)
    for given in (bias, None):
        plain = residual(len(x), n, dtype)
        getattr(reference, op)(x, weight, given, plain)
        wanted = exact(x, weight, given, op)
        for num_rows in ROW_COUNTS:
            result = run(x[:num_rows], weight, given, op)
            oracle.assert_ratio(result, plain[:num_rows], wanted[:num_rows])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_does_not_depend_on_its_batch_mates(
    n: int, k: int, dtype: torch.dtype, op: str
) -> None:
    """Nor on the tiling that so many rows get."""
    x, weight, bias = make(37, n, k, dtype, op)
    together = run(x, weight, bias, op)
    for num_rows in range(1, 37):
        assert torch.equal(run(x[:num_rows], weight, bias, op), together[:num_rows])
        assert torch.equal(run(x[-num_rows:], weight, bias, op), together[-num_rows:])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype, op: str) -> None:
    x, weight, bias = make(19, 96, 128, dtype, op)
    expected = run(x[:, 32:96].contiguous(), weight[:, 64:].contiguous(), bias, op)
    wide = torch.full((19, 100), float("nan"), dtype=dtype, device="cuda")
    out = wide[:, 2:98]
    if op == "linear_add":
        out.copy_(residual(19, 96, dtype))
    getattr(torch.ops.pyserve, op)(x[:, 32:96], weight[:, 64:], bias, out)
    assert torch.equal(out, expected)
    assert bool(wide[:, :2].isnan().all()) and bool(wide[:, 98:].isnan().all())
    every_other = run(x[::4, 32:96], weight[:, 64:], bias, op)
    assert torch.equal(every_other, run(x[::4, 32:96].contiguous(), weight[:, 64:], bias, op))
    # Not aligned to 16 bytes: the plain kernel, other rounding.
    odd_x, odd_weight = x[:, 31:95], weight[:, 63:127]
    plain = residual(19, 96, dtype)
    getattr(reference, op)(odd_x, odd_weight, None, plain)
    oracle.assert_ratio(run(odd_x, odd_weight, op=op), plain, exact(odd_x, odd_weight, None, op))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (33, 50)])
def test_a_row_of_nan_or_inf_stays_alone(n: int, k: int, op: str) -> None:
    x, weight, bias = make(20, n, k, torch.bfloat16, op)
    expected = run(x, weight, bias, op)
    x[3, 0], x[17, 1] = float("nan"), float("inf")
    result = run(x, weight, bias, op)
    assert bool(result[3].isnan().all())
    if op != "linear_silu_mul":  # there -inf may become 0
        assert not bool(result[17].isfinite().any())
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(result[others], expected[others])


def test_no_rows_no_columns_nothing_to_sum() -> None:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device="cuda", dtype=torch.bfloat16)

    for op in OPS:
        n = 8 if op == "linear_silu_mul" else 16
        assert run(ones(0, 32), ones(16, 32), op=op).shape == (0, n)
        assert run(ones(2, 32), ones(0, 32), op=op).shape == (2, 0)
    bias = torch.arange(16, device="cuda").bfloat16()
    assert torch.equal(run(ones(2, 0), ones(16, 0), bias), bias.expand(2, 16))
    added = run(ones(2, 0), ones(16, 0), bias, "linear_add")
    assert torch.equal(added, residual(2, 16, torch.bfloat16) + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 8, 9, 64, 65, 200, 512, 2048])
def test_what_serves_any_number_of_rows(num_rows: int, dtype: torch.dtype) -> None:
    """The wrappers, with own kernels and cuBLAS behind them: no worse than twice plain torch."""
    for op in OPS:
        x, weight, bias = make(num_rows, 512, 1024, dtype, op)
        for given in (None, bias):
            out = residual(num_rows, 512, dtype)
            if op == "linear":
                ops.linear(x, weight, given, out)
            elif op == "linear_add":
                ops.linear_add(x, weight, given, out)
            else:
                gate_up = torch.empty(num_rows, 1024, dtype=dtype, device="cuda")
                ops.linear_silu_mul(x, weight, given, out, gate_up)
            # Two roundings at most, of values no larger than twice the result's largest.
            two = 2 * torch.finfo(dtype).eps
            wanted = exact(x, weight, given, op)
            assert bool((out.double() - wanted).abs().max() <= two * wanted.abs().max())


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel for many rows is Hopper's",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(14336, 4096), (14344, 4104), (8192, 3072)])
def test_many_rows_of_a_gated_mlp(n: int, k: int, dtype: torch.dtype) -> None:
    """Whole and cut tiles of rows, columns and k, with and without a bias; equal bits each time."""
    num_served = 0
    x, weight, bias = make(4100, n, k, dtype, "linear_silu_mul")
    weight, bias = weight / 4, bias / 4
    for num_rows in (65, 100, 128, 129, 200, 256, 300, 384, 511, 512, 1000, 2049, 4100):
        if not torch.ops.pyserve.serves_linear(weight, num_rows, 2):
            continue
        num_served += 1
        for given in (bias, None):
            part = x[:num_rows]
            plain = torch.empty(num_rows, n, dtype=dtype, device="cuda")
            reference.linear_silu_mul(part, weight, given, plain)
            result = run(part, weight, given, "linear_silu_mul")
            oracle.assert_ratio(result, plain, exact(part, weight, given, "linear_silu_mul"))
            assert torch.equal(run(part, weight, given, "linear_silu_mul"), result)
    assert num_served >= 3


@pytest.mark.parametrize("op", OPS)
def test_in_a_graph(op: str) -> None:
    x, weight, bias = make(1, 1024, 512, torch.bfloat16, op)
    expected, out = run(x, weight, bias, op), residual(1, 1024, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        getattr(torch.ops.pyserve, op)(x, weight, bias, out)
    out.copy_(residual(1, 1024, torch.bfloat16))
    graph.replay()
    assert torch.equal(out, expected)


def test_refusals() -> None:
    x, weight, bias = make(2, 4, 8, torch.bfloat16)
    with pytest.raises(RuntimeError, match="size 1 of weight is 8, expected 7"):
        run(x[:, :7], weight)
    with pytest.raises(RuntimeError, match="size 0 of bias is 3, expected 4"):
        run(x, weight, bias[:3])
    with pytest.raises(RuntimeError, match="weight is Half, x is BFloat16"):
        run(x, weight.half())
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16, got Float"):
        run(x.float(), weight.float())
    with pytest.raises(RuntimeError, match="size 1 of residual is 3, expected 4"):
        torch.ops.pyserve.linear_add(x, weight, None, x.new_empty(2, 3))
    with pytest.raises(RuntimeError, match="linear_silu_mul: size 0 of weight is 4, expected 8"):
        torch.ops.pyserve.linear_silu_mul(x, weight, None, x.new_empty(2, 4))
    with pytest.raises(RuntimeError, match="serves_linear: epilogue 3"):
        torch.ops.pyserve.serves_linear(weight, 1, 3)


def test_own_kernels_serve_few_rows() -> None:
    _, weight, _ = make(1, 4096, 4096, torch.bfloat16)
    for epilogue in range(3):
        assert all(torch.ops.pyserve.serves_linear(weight, m, epilogue) for m in range(1, 9))
        assert not torch.ops.pyserve.serves_linear(weight, 100_000, epilogue)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="one pass over the weight for more than 8 rows is Hopper's",
)
def test_hopper_serves_32_rows() -> None:
    _, weight, _ = make(1, 4096, 4096, torch.bfloat16)
    served = [m for m in range(1, 65) if torch.ops.pyserve.serves_linear(weight, m, 0)]
    assert served == list(range(1, 33))
    assert ops.max_norm_rows(weight.device, weight.dtype) == 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (2120, 512), (1536, 14336), (24, 64), (8, 8)])
def test_a_norm_between_two_linears_may_be_a_factor(n: int, k: int, dtype: torch.dtype) -> None:
    """The first adds to the residual of n columns, the second multiplies its norm."""
    eps = 1e-5
    x, weight, bias = make(33, n, k, dtype)
    norm_weight = 1 + torch.randn(n, device=x.device).to(dtype) / 4
    for num_rows in (1, 2, 3, 5, 8, 9, 16, 17, 32, 33):
        given = residual(33, n, dtype)[:num_rows].contiguous()
        torch.ops.pyserve.linear_add(x[:num_rows], weight, bias, given)
        added = residual(33, n, dtype)[:num_rows].contiguous()
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
    x, weight, _ = make(2, 24, 8, DTYPES[0])
    out, squares = run(x, weight), torch.ones(2, 1, device=x.device)
    with pytest.raises(RuntimeError, match="size 1 of x_squares is 2, expected 1"):
        torch.ops.pyserve.linear(x, weight, None, out, squares.expand(2, 2).contiguous(), 1e-5)
    with pytest.raises(RuntimeError, match="x_squares must be Float, got Int"):
        torch.ops.pyserve.linear(x, weight, None, out, squares.int(), 1e-5)
    with pytest.raises(RuntimeError, match="norm_weight, scaled and squares go together"):
        torch.ops.pyserve.linear_add(x, weight, None, out, weight[:, 0].contiguous())
    with pytest.raises(RuntimeError, match="size 1 of squares is 1, expected 2"):
        ops.linear_add_for_norm(x, weight, None, out, weight[:, 0].contiguous(), out + 1, squares)
