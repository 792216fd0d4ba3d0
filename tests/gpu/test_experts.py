"""The ops of a mixture of experts on CUDA: as their twins, ratio rule, the same in a graph, and a
token's result that depends on nothing but the token."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from pyserve.ops.experts import (
    Routing,
    Rule,
    combine_experts,
    grouped_linear,
    grouped_linear_silu_mul,
    route,
)
from tests.ops import oracle

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
RULES = {
    "softmax": Rule(is_normalized=False),
    "softmax of the chosen": Rule(),
    "best groups": Rule(is_normalized=False, scale=16.0, num_groups=4, top_groups=2),
    "sigmoid": Rule(is_sigmoid=True, scale=2.5),
    "sigmoid of groups": Rule(is_sigmoid=True, num_groups=8, top_groups=4),
}
TOKENS = (1, 2, 8, 16, 17, 31, 32, 33, 64, 200, 3000)


def empty_routing(num_tokens: int, num_experts: int, top_k: int, *, has_gate: bool) -> Routing:
    """Nothing but garbage."""

    def full(*shape: int, value: float = 77, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=DEVICE)

    return Routing(
        full(num_tokens, num_experts + has_gate, value=torch.nan, dtype=torch.float32),
        full(num_tokens, top_k + has_gate, value=torch.nan, dtype=torch.float32),
        full(num_tokens, top_k), full(num_tokens * top_k), full(num_experts + 1),
    )  # fmt: skip


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def twin_of(rule: Rule) -> tuple[bool, bool, float, int, int]:
    return rule.is_sigmoid, rule.is_normalized, rule.scale, rule.num_groups, rule.top_groups


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden"), [(8, 2, 64), (128, 8, 2048), (512, 10, 264), (60, 4, 8)]
)
def test_route(num_experts: int, top_k: int, hidden: int, name: str, dtype: torch.dtype) -> None:
    rule = RULES[name]
    if num_experts % rule.num_groups:
        pytest.skip("groups must divide")
    torch.manual_seed(num_experts)
    for num_tokens in TOKENS:
        has_gate = num_tokens % 2 == 0
        x = randn(num_tokens, hidden, dtype=dtype)
        router = randn(num_experts + has_gate, hidden, dtype=dtype) / hidden**0.5
        bias = torch.rand(num_experts, device=DEVICE) if rule.is_sigmoid else None
        slots = torch.arange(num_tokens, device=DEVICE)
        slots[num_tokens // 2 :: 5] = -1
        mine, twin = (
            empty_routing(num_tokens, num_experts, top_k, has_gate=has_gate) for _ in range(2)
        )
        route(x, router, bias, slots, rule, mine)
        reference.route(x, router, bias, slots, *twin_of(rule), *twin)
        torch.testing.assert_close(mine.logits, twin.logits, rtol=1e-4, atol=1e-4)
        # Where two scores are nearly the same, another choice is rounding.
        experts_mine, experts_twin = (
            torch.bucketize(it.places, it.offsets, right=True) for it in (mine, twin)
        )
        same = (experts_mine == experts_twin).all(1)
        assert float(same.float().mean()) > 0.99, num_tokens
        torch.testing.assert_close(mine.weights[same], twin.weights[same], rtol=1e-4, atol=1e-5)
        check_order(mine, slots >= 0, top_k)


def check_order(routing: Routing, is_there: Tensor, top_k: int) -> None:
    """Each assignment has a row, the rows of an expert are those of its tokens, in order."""
    order, offsets = routing.order.cpu(), routing.offsets.cpu()
    count = int(offsets[-1])
    assert count == int(is_there.sum()) * top_k and offsets[0] == 0
    assert bool((order[count:] == -1).all())
    assert bool((routing.places[~is_there] == -1).all())
    flat = routing.places.flatten().cpu()
    assert torch.equal(flat[order[:count].long()], torch.arange(count, dtype=torch.int32))
    for begin, end in pairwise(offsets.tolist()):
        assert bool((order[begin:end].diff() > 0).all())


def counted(*counts: int) -> Routing:
    """Tokens with one expert each, so many of each expert, in an order of their own."""
    total = sum(counts)
    routing = empty_routing(total, len(counts), 1, has_gate=False)
    routing.offsets[:] = torch.tensor([0, *counts]).cumsum(0)
    routing.order[:] = torch.randperm(total)
    routing.places[routing.order.long(), 0] = torch.arange(total, dtype=torch.int32, device=DEVICE)
    return routing


COUNTS = [
    (1, 0, 0), (0, 1, 1, 2), (3, 0, 5), (7, 9, 0, 0), (16, 2, 0, 14), (17, 0, 16), (40, 0, 33),
    (90, 5, 0), (1, 130, 0, 20), (0, 300, 129, 1, 128), (1000, 5, 0, 700),
]  # fmt: skip
SHAPES = [(14336, 4096), (768, 2048), (40, 72), (8, 8), (264, 520), (256, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_grouped_linears(n: int, k: int, dtype: torch.dtype) -> None:
    for counts in COUNTS:
        if n * k > 2**22 and len(counts) > 3:
            continue
        torch.manual_seed(n)
        routing, total = counted(*counts), sum(counts)
        x = randn(total, k, dtype=dtype)
        gate_up = randn(len(counts), 2 * n, k, dtype=dtype) / 8
        down = randn(len(counts), n, k, dtype=dtype) / 8
        out, plain = torch.full((2, total, n), torch.nan, dtype=dtype, device=DEVICE)
        room = torch.full_like(x, torch.nan)
        grouped_linear_silu_mul(x, gate_up, routing, out, room)
        reference.grouped_linear_silu_mul(
            x, gate_up, routing.order, routing.offsets, torch.empty_like(x), plain
        )
        in_order = x[routing.order.long()]
        exact = torch.cat(
            [
                oracle.silu_mul(in_order[begin:end].double() @ matrix.double().T)
                for matrix, (begin, end) in zip(
                    gate_up, pairwise(routing.offsets.tolist()), strict=True
                )
            ]
        )
        oracle.assert_ratio(out, plain, exact)
        grouped_linear(in_order, down, routing, out)
        reference.grouped_linear(in_order, down, routing.offsets, total, plain)
        exact = torch.cat(
            [
                in_order[begin:end].double() @ matrix.double().T
                for matrix, (begin, end) in zip(
                    down, pairwise(routing.offsets.tolist()), strict=True
                )
            ]
        )
        oracle.assert_ratio(out, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_few_is_what_linear_makes_of_it(dtype: torch.dtype) -> None:
    """Bit for bit: the same products in the same order."""
    routing = counted(1, 0, 3, 4)
    x, weight = randn(8, 1032, dtype=dtype), randn(4, 2 * 136, 1032, dtype=dtype) / 8
    out = torch.full((8, 136), torch.nan, dtype=dtype, device=DEVICE)
    grouped_linear_silu_mul(x, weight, routing, out, torch.empty_like(x))
    expected = torch.empty_like(out)
    for expert, (begin, end) in enumerate(pairwise(routing.offsets.tolist())):
        for row in range(begin, end):
            one = x[routing.order[row].long(), None]
            torch.ops.pyserve.linear_silu_mul(one, weight[expert], None, expected[row, None])
    assert torch.equal(out, expected)


def test_rows_of_nan_keep_to_themselves() -> None:
    """Also the rows of the next expert that a tile holds, and what nobody wrote."""
    for counts in ((2, 3), (70, 90)):
        routing, total = counted(*counts), sum(counts)
        x = randn(total, 256, dtype=torch.bfloat16)
        weight = randn(2, 512, 256, dtype=torch.bfloat16) / 8
        outs = torch.empty(2, total, 256, dtype=torch.bfloat16, device=DEVICE)
        for out, value in zip(outs, (1.0, torch.nan), strict=True):
            x[routing.order[-1].long()] = value
            grouped_linear_silu_mul(x, weight, routing, out, torch.full_like(x, torch.nan))
        assert torch.equal(outs[0, :-1], outs[1, :-1]) and bool(outs[1, -1].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_combine(num_tokens: int, dtype: torch.dtype) -> None:
    top_k, num_experts, width = 4, 16, 1032
    for has_gate in (False, True):
        routing = empty_routing(num_tokens, num_experts, top_k, has_gate=has_gate)
        x = randn(num_tokens, 64, dtype=dtype)
        slots = torch.arange(num_tokens, device=DEVICE)
        slots[3:4] = -1
        router = randn(num_experts + has_gate, 64, dtype=dtype)
        route(x, router, None, slots, Rule(), routing)
        rows = randn(num_tokens * top_k, width, dtype=dtype)
        rows[int(routing.offsets[-1]) :] = torch.nan
        for shared in (None, randn(num_tokens, width, dtype=dtype))[has_gate:]:
            for is_adding in (False, True):
                residual = randn(num_tokens, width, dtype=dtype)
                out, plain, exact = residual.clone(), residual.clone(), residual.double()
                placed = routing.places, routing.weights
                combine_experts(rows, routing, shared, out, is_adding=is_adding)
                reference.combine_experts(rows, *placed, shared, is_adding, plain)
                double = None if shared is None else shared.double()
                sums = torch.zeros_like(exact)
                for j in range(top_k):
                    there = routing.places[:, j] >= 0
                    row = rows[routing.places[there, j].long()].double()
                    sums[there] += routing.weights[there, j, None].double() * row
                if double is not None:
                    gate = routing.weights[:, -1:].double() if has_gate else 1.0
                    sums += gate * double
                oracle.assert_ratio(out, plain, exact + sums if is_adding else sums)


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 64, 512])
def test_a_layer_in_a_graph(num_tokens: int) -> None:
    """Captured with tokens that go to one expert, replayed with tokens that go elsewhere."""
    torch.manual_seed(num_tokens)
    hidden, size, num_experts, top_k = 256, 128, 16, 4
    router = randn(num_experts, hidden, dtype=torch.bfloat16)
    gate_up = randn(num_experts, 2 * size, hidden, dtype=torch.bfloat16) / 8
    down = randn(num_experts, hidden, size, dtype=torch.bfloat16) / 8
    x = torch.zeros(num_tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.arange(num_tokens, device=DEVICE)
    routing = empty_routing(num_tokens, num_experts, top_k, has_gate=False)
    activated = x.new_empty(num_tokens * top_k, size)
    rows = x.new_empty(num_tokens * top_k, hidden)
    residual = torch.zeros_like(x)

    def layer() -> None:
        route(x, router, None, slots, Rule(), routing)
        grouped_linear_silu_mul(x, gate_up, routing, activated, rows)
        grouped_linear(activated, down, routing, rows)
        combine_experts(rows, routing, None, residual, is_adding=True)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    for _ in range(3):
        x.normal_()
        slots[: num_tokens // 3] = -1
        residual.zero_()
        graph.replay()
        replayed = residual.clone()
        residual.zero_()
        layer()
        assert torch.equal(replayed, residual)
        exact = torch.zeros(num_tokens, hidden, dtype=torch.float64, device=DEVICE)
        experts = torch.bucketize(routing.places, routing.offsets, right=True) - 1
        for token in range(num_tokens // 3, num_tokens, 7):
            for j in range(top_k):
                expert = int(experts[token, j])
                made = ops.silu_mul(
                    (x[token, None].double() @ gate_up[expert].double().T).bfloat16()
                )
                exact[token] += (
                    float(routing.weights[token, j]) * (made.double() @ down[expert].double().T)[0]
                )
            error = (residual[token].double() - exact[token]).norm() / exact[token].norm()
            assert float(error) < 0.02
        assert not bool(residual[: num_tokens // 3].any())


def test_refusals() -> None:
    routing = counted(1, 1)
    x = randn(2, 12, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="rows of x must be whole vectors of 16 bytes"):
        grouped_linear(x, randn(2, 8, 12, dtype=torch.bfloat16), routing, x.new_empty(2, 8))
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16, got Float"):
        x = torch.randn(2, 16, device=DEVICE)
        grouped_linear(x, torch.randn(2, 8, 16, device=DEVICE), routing, x.new_empty(2, 8))
