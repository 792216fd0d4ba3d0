"""linear, linear_add and linear_silu_mul of 33 to 128 rows by skinny_sm90a.cu, on Hopper."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from tests.gpu.test_linear import DTYPES, OPS, exact, make, residual, run
from tests.ops import oracle

CARD = "cuda"
ROW_COUNTS = (33, 40, 63, 64, 65, 100, 128)
# (n, k): many tiles a CTA and many CTAs a tile; tails of n and k; fewer tiles than CTAs.
SHAPES = [
    (6144, 4096), (4096, 4096), (512, 14336), (3000, 3584), (20000, 1024), (2120, 72), (16, 64),
    (8, 5120), (136, 1032),
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is Hopper's",
)


@pytest.fixture(params=[128, 64], autouse=True)
def tile_rows(request: pytest.FixtureRequest) -> Iterator[int]:
    """Weight rows of a tile."""
    weight = torch.empty(8, 8, dtype=torch.bfloat16, device=CARD)
    torch.ops.pyserve.try_skinny(weight, 128, request.param)
    yield request.param
    torch.ops.pyserve.try_skinny(weight, -1, -1)


def assert_own(weight: Tensor, op: str) -> None:
    serves = torch.ops.pyserve.serves_linear
    assert all(serves(weight, m, OPS.index(op)) for m in range(33, 129))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(n: int, k: int, dtype: torch.dtype, op: str) -> None:
    """No worse than twice plain torch; no row depends on the others, nor on how many there are."""
    x, weight, bias = make(128, n, k, dtype, op)
    assert_own(weight, op)
    for given in (bias, None):
        plain = residual(128, n, dtype)
        getattr(reference, op)(x, weight, given, plain)
        together = run(x, weight, given, op)
        oracle.assert_ratio(together, plain, exact(x, weight, given, op))
        for num_rows in ROW_COUNTS:
            assert torch.equal(run(x[:num_rows], weight, given, op), together[:num_rows])
            assert torch.equal(run(x[-num_rows:], weight, given, op), together[-num_rows:])


@pytest.mark.parametrize("op", OPS)
def test_strided_rows(op: str) -> None:
    x, weight, bias = make(70, 96, 192, torch.bfloat16, op)
    expected = run(x[:, 64:].contiguous(), weight[:, 64:].contiguous(), bias, op)
    wide = torch.full((70, 112), float("nan"), dtype=x.dtype, device=CARD)
    out = wide[:, 8:104]
    if op == "linear_add":
        out.copy_(residual(70, 96, x.dtype))
    getattr(torch.ops.pyserve, op)(x[:, 64:], weight[:, 64:], bias, out)
    assert torch.equal(out, expected)
    assert bool(wide[:, :8].isnan().all()) and bool(wide[:, 104:].isnan().all())


@pytest.mark.parametrize("op", OPS)
def test_a_row_of_nan_stays_alone(op: str) -> None:
    x, weight, bias = make(90, 512, 1024, torch.bfloat16, op)
    expected = run(x, weight, bias, op)
    x[3, 0] = float("nan")
    result = run(x, weight, bias, op)
    assert bool(result[3].isnan().all())
    others = [row for row in range(90) if row != 3]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (2120, 512), (1536, 14336), (24, 64)])
def test_a_norm_between_two_linears_may_be_a_factor(n: int, k: int) -> None:
    """As in test_linear: the first adds to the residual of n columns, the second has its norm."""
    eps, dtype = 1e-5, torch.bfloat16
    x, weight, bias = make(128, n, k, dtype)
    norm_weight = 1 + torch.randn(n, device=CARD).to(dtype) / 4
    for num_rows in ROW_COUNTS:
        given = residual(num_rows, n, dtype).contiguous()
        torch.ops.pyserve.linear_add(x[:num_rows], weight, bias, given)
        added = residual(num_rows, n, dtype).contiguous()
        wide = torch.full((num_rows, n + 8), torch.nan, dtype=dtype, device=CARD)
        squares = torch.full((num_rows, ops.num_squares(n)), torch.nan, device=CARD)
        scaled = wide[:, :n]
        ops.linear_add_for_norm(x[:num_rows], weight, bias, added, norm_weight, scaled, squares)
        assert torch.equal(added, given), "the residual is what it is without a norm"
        assert torch.equal(scaled, (added.float() * norm_weight.float()).to(dtype))
        assert bool(wide[:, n:].isnan().all())
        mean = added.double().square().mean(1, keepdim=True)
        torch.testing.assert_close(squares.double().sum(1, keepdim=True) / n, mean)
        normed = scaled.double() / (mean + eps).sqrt()
        for op, width in (("linear", 40), ("linear_silu_mul", 24)):
            torch.manual_seed(1)
            rows = 2 * width if op == "linear_silu_mul" else width
            second = (torch.randn(rows, n, device=CARD) / n**0.5).to(dtype)
            second_bias = torch.randn(rows, device=CARD).to(dtype)
            sums = normed @ second.double().T + second_bias.double()
            wanted = oracle.silu_mul(sums) if op == "linear_silu_mul" else sums
            out = torch.full((num_rows, width), torch.nan, dtype=dtype, device=CARD)
            call = ops.linear_of_scaled if op == "linear" else ops.linear_silu_mul_of_scaled
            call(scaled, second, second_bias, out, squares, eps)
            oracle.assert_ratio(out, wanted.to(dtype), wanted, plain_float32_error=3e-6)


@pytest.mark.parametrize("num_rows", [33, 64, 128])
def test_a_chain_is_the_same_each_time(num_rows: int) -> None:
    """Two layers in a graph, where each kernel starts while the one in front still runs."""
    hidden, intermediate = 1536, 4096
    sizes = [(hidden, hidden), (hidden, hidden), (2 * intermediate, hidden), (hidden, intermediate)]
    torch.manual_seed(2)
    layers = [
        [(torch.randn(n, k, device=CARD) / k**0.5).bfloat16() for n, k in sizes] for _ in range(2)
    ]
    norm = torch.ones(hidden, dtype=torch.bfloat16, device=CARD)
    first = torch.randn(num_rows, hidden, device=CARD).bfloat16()
    r, scaled, mixed = first.clone(), first.clone(), torch.empty_like(first)
    act = torch.empty(num_rows, intermediate, dtype=first.dtype, device=CARD)
    squares = torch.empty(num_rows, ops.num_squares(hidden), device=CARD)

    def chain() -> None:
        r.copy_(first)
        scaled.copy_(first)
        squares.fill_(16.0)
        for qkv, o, gate_up, down in layers:
            ops.linear_of_scaled(scaled, qkv, None, mixed, squares, 1e-5)
            ops.linear_add_for_norm(mixed, o, None, r, norm, scaled, squares)
            ops.linear_silu_mul_of_scaled(scaled, gate_up, None, act, squares, 1e-5)
            ops.linear_add_for_norm(act, down, None, r, norm, scaled, squares)

    chain()
    wanted = r.clone()
    assert bool(wanted.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(200):
        r.zero_()
        graph.replay()
        assert torch.equal(r, wanted)


def test_the_switch() -> None:
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device=CARD)
    serves, switch = torch.ops.pyserve.serves_linear, torch.ops.pyserve.try_skinny
    for most, served in ((40, [32, 33, 40]), (0, [32]), (-1, [32])):
        switch(weight, most, -1)
        assert [m for m in (32, 33, 40, 41) if serves(weight, m, 0)] == served
    with pytest.raises(RuntimeError, match="try_skinny: max_rows is 129, not -1 to 128"):
        switch(weight, 129, -1)
    with pytest.raises(RuntimeError, match="try_skinny: tile_rows is 32, not -1, 64 or 128"):
        switch(weight, 128, 32)


def test_what_is_not_aligned_goes_elsewhere() -> None:
    x, weight, _ = make(40, 100, 128, torch.bfloat16)
    plain = residual(40, 100, x.dtype)
    reference.linear(x, weight, None, plain)
    oracle.assert_ratio(run(x, weight), plain, exact(x, weight, None, "linear"))
    assert not torch.ops.pyserve.serves_linear(weight, 40, 0)
