"""linear on CUDA: ratio rule on odd shapes; a row's result depends on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import oracle

DTYPES = (torch.bfloat16, torch.float16)
ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33)
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


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op itself, whatever the number of rows, into memory that holds NaN."""
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype, device="cuda")
    torch.ops.pyserve.linear(x, weight, bias, out)
    return out


def make(num_rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + k)
    x, weight, bias = (
        torch.randn(shape, device="cuda").to(dtype) for shape in [(num_rows, k), (n, k), (n,)]
    )
    return x, weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = make(max(ROW_COUNTS), n, k, dtype)
    product = x.double() @ weight.double().T
    plain = (x.float() @ weight.float().T).to(dtype)
    plain_biased = (x.float() @ weight.float().T + bias.float()).to(dtype)
    for num_rows in ROW_COUNTS:
        part = x[:num_rows]
        oracle.assert_ratio(run(part, weight), plain[:num_rows], product[:num_rows])
        exact = (product + bias.double())[:num_rows]
        oracle.assert_ratio(run(part, weight, bias), plain_biased[:num_rows], exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_does_not_depend_on_its_batch_mates(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = make(max(ROW_COUNTS), n, k, dtype)
    together = run(x, weight, bias)
    for num_rows in ROW_COUNTS:
        assert torch.equal(run(x[:num_rows], weight, bias), together[:num_rows])
        assert torch.equal(run(x[-num_rows:], weight, bias), together[-num_rows:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype: torch.dtype) -> None:
    x, weight, bias = make(19, 96, 128, dtype)
    expected = run(x[:, 32:96].contiguous(), weight[:, 64:].contiguous(), bias)
    wide = torch.full((19, 100), float("nan"), dtype=dtype, device="cuda")
    out = wide[:, 2:98]
    torch.ops.pyserve.linear(x[:, 32:96], weight[:, 64:], bias, out)
    assert torch.equal(out, expected)
    assert bool(wide[:, :2].isnan().all()) and bool(wide[:, 98:].isnan().all())
    assert torch.equal(run(x[::2, 32:96], weight[:, 64:], bias), expected[::2])
    # Not aligned to 16 bytes: the plain kernel, other rounding.
    exact = x[:, 31:95].double() @ weight[:, 63:127].double().T
    plain = (x[:, 31:95].float() @ weight[:, 63:127].float().T).to(dtype)
    oracle.assert_ratio(run(x[:, 31:95], weight[:, 63:127]), plain, exact)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (33, 50)])
def test_a_row_of_nan_or_inf_stays_alone(n: int, k: int) -> None:
    x, weight, bias = make(20, n, k, torch.bfloat16)
    expected = run(x, weight, bias)
    x[3, 0], x[17, 1] = float("nan"), float("inf")
    result = run(x, weight, bias)
    assert bool(result[3].isnan().all())
    assert not bool(result[17].isfinite().any())
    others = [row for row in range(20) if row not in (3, 17)]
    assert torch.equal(result[others], expected[others])


def test_no_rows_no_columns_nothing_to_sum() -> None:
    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device="cuda", dtype=torch.bfloat16)

    assert run(ones(0, 32), ones(16, 32)).shape == (0, 16)
    assert run(ones(2, 32), ones(0, 32)).shape == (2, 0)
    bias = torch.arange(16, device="cuda").bfloat16()
    assert torch.equal(run(ones(2, 0), ones(16, 0), bias), bias.expand(2, 16))


def test_in_a_graph() -> None:
    x, weight, bias = make(1, 1024, 512, torch.bfloat16)
    expected, out = run(x, weight, bias), torch.empty(1, 1024, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.pyserve.linear(x, weight, bias, out)
    out.fill_(float("nan"))
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
