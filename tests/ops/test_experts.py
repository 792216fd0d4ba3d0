"""route, grouped_linear, grouped_linear_silu_mul and combine_experts: an oracle in float64 that is
written apart, ratio rule on odd shapes, and a token's result that depends on nothing but the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyserve import limits, ops
from pyserve.ops import reference
from pyserve.ops.experts import (
    CHUNK_ROWS,
    Routing,
    Rule,
    combine_experts,
    grouped_linear,
    grouped_linear_silu_mul,
    route,
)
from tests.ops import oracle

NUM_EXPERTS = 8
RULES = {
    "softmax": Rule(is_normalized=False),
    "softmax of the chosen": Rule(),
    "scaled": Rule(is_normalized=False, scale=16.0),
    "best groups": Rule(is_normalized=False, num_groups=4, top_groups=2),
    "sigmoid": Rule(is_sigmoid=True, scale=2.5),
    "sigmoid, plain": Rule(is_sigmoid=True, is_normalized=False),
    "sigmoid of groups": Rule(is_sigmoid=True, num_groups=4, top_groups=2),
}


def empty_routing(
    num_tokens: int, top_k: int, num_experts: int = NUM_EXPERTS, *, has_gate: bool = False
) -> Routing:
    """Nothing but garbage."""
    return Routing(
        torch.full((num_tokens, num_experts + has_gate), torch.nan),
        torch.full((num_tokens, top_k + has_gate), torch.nan),
        torch.full((num_tokens, top_k), 77, dtype=torch.int32),
        torch.full((num_tokens * top_k,), 77, dtype=torch.int32),
        torch.full((num_experts + 1,), 77, dtype=torch.int32),
    )


def routed(
    x: Tensor, router: Tensor, rule: Rule = RULES["softmax"], *, top_k: int = 2,
    bias: Tensor | None = None, slots: Tensor | None = None, has_gate: bool = False,
) -> Routing:  # fmt: skip
    routing = empty_routing(len(x), top_k, len(router) - has_gate, has_gate=has_gate)
    slots = torch.arange(len(x)) if slots is None else slots
    route(x, router, bias, slots, rule, routing)
    return routing


def experts_of(routing: Routing) -> Tensor:
    """[num_tokens, top_k], -1 of padding."""
    experts = torch.bucketize(routing.places, routing.offsets, right=True) - 1
    return experts.masked_fill(routing.places < 0, -1)


def exact_choice(logits: Tensor, rule: Rule, bias: Tensor | None, top_k: int) -> dict[int, float]:
    """The experts of one token, in order, and their weights: one by one, in float64."""
    score = torch.sigmoid(logits) if rule.is_sigmoid else torch.softmax(logits, 0)
    choice = score if bias is None else score + bias
    size = len(logits) // rule.num_groups
    num_summed = 2 if rule.is_sigmoid else 1
    worth = {
        group: sum(sorted(choice[group * size :][:size].tolist())[-num_summed:])
        for group in range(rule.num_groups)
    }
    groups = sorted(worth, key=lambda group: -worth[group])[: rule.top_groups]
    ranked = sorted(
        (expert for expert in range(len(logits)) if expert // size in groups),
        key=lambda expert: -float(choice[expert]),
    )[:top_k]
    total = sum(float(score[expert]) for expert in ranked) if rule.is_normalized else 1.0
    return {expert: float(score[expert]) / total * rule.scale for expert in ranked}


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_route(name: str, dtype: torch.dtype) -> None:
    rule = RULES[name]
    torch.manual_seed(3)
    for hidden, top_k in ((1, 1), (50, 2), (64, 3), (259, 4)):
        x, router = torch.randn(9, hidden).to(dtype), torch.randn(NUM_EXPERTS, hidden).to(dtype)
        bias = torch.randn(NUM_EXPERTS) / 4 if rule.is_sigmoid else None
        routing = routed(x, router, rule, top_k=top_k, bias=bias)
        logits = x.double() @ router.double().T
        for token, experts in enumerate(experts_of(routing).tolist()):
            exact = exact_choice(logits[token], rule, bias, top_k)
            assert experts == list(exact)
            torch.testing.assert_close(
                routing.weights[token].double(), torch.tensor(list(exact.values())).double(),
                rtol=1e-5, atol=1e-6,
            )  # fmt: skip


def test_rows_are_sorted_by_expert_then_by_token() -> None:
    x, router = torch.randn(40, 16), torch.randn(NUM_EXPERTS, 16)
    slots = torch.arange(40)
    slots[[0, 7, 39]] = -1
    routing = routed(x, router, top_k=3, slots=slots, has_gate=False)
    experts = experts_of(routing)
    assert (experts == -1).any(1).nonzero().flatten().tolist() == [0, 7, 39]
    assert not bool(routing.weights[[0, 7, 39]].any())
    count = int(routing.offsets[-1])
    assert count == 37 * 3 and routing.offsets[0] == 0
    assert set(routing.order[count:].tolist()) == {-1}
    flat_places, flat_experts = routing.places.flatten(), experts.flatten()
    for row, assignment in enumerate(routing.order[:count].tolist()):
        assert flat_places[assignment] == row
    for expert, (begin, end) in enumerate(pairwise(routing.offsets.tolist())):
        mine = routing.order[begin:end].tolist()
        assert mine == sorted(mine)
        assert {int(flat_experts[assignment]) for assignment in mine} <= {expert}


def test_equal_experts_are_taken_from_the_first_on() -> None:
    x, router = torch.ones(2, 4), torch.ones(NUM_EXPERTS, 4)
    assert experts_of(routed(x, router, top_k=3)).tolist() == [[0, 1, 2]] * 2
    router[5:7] = 2.0
    assert experts_of(routed(x, router, top_k=3)).tolist() == [[5, 6, 0]] * 2
    grouped = Rule(num_groups=4, top_groups=1)
    assert experts_of(routed(x, torch.ones(8, 4), grouped, top_k=2)).tolist() == [[0, 1]] * 2


def test_a_shared_gate_is_the_last_weight() -> None:
    x, router = torch.randn(5, 16), torch.randn(NUM_EXPERTS + 1, 16)
    routing = routed(x, router, has_gate=True, slots=torch.tensor([0, 1, -1, 3, 4]))
    expected = (x @ router[-1]).sigmoid()
    expected[2] = 0.0
    torch.testing.assert_close(routing.weights[:, -1], expected)
    without = routed(x, router[:-1], slots=torch.tensor([0, 1, -1, 3, 4]))
    assert torch.equal(routing.places, without.places)
    assert torch.equal(routing.weights[:, :2], without.weights)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_the_twin_routes_alike(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    rule = RULES[name]
    x, router = torch.randn(33, 72).to(dtype), torch.randn(NUM_EXPERTS + 1, 72).to(dtype)
    x[4, 0], x[9] = torch.nan, torch.inf
    slots = torch.arange(33)
    slots[5] = -1
    bias = torch.randn(NUM_EXPERTS) / 4
    mine = routed(x, router, rule, top_k=3, bias=bias, slots=slots, has_gate=True)
    twin = empty_routing(33, 3, has_gate=True)
    reference.route(
        x, router, bias, slots, rule.is_sigmoid, rule.is_normalized, rule.scale, rule.num_groups,
        rule.top_groups, *twin,
    )  # fmt: skip
    for actual, expected in zip(mine, twin, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_token_of_nan_keeps_to_itself() -> None:
    x, router = torch.randn(6, 16), torch.randn(NUM_EXPERTS, 16)
    expected = routed(x, router)
    x[2, 3] = torch.nan
    routing = routed(x, router)
    assert experts_of(routing)[2].tolist() == [0, 1]
    assert bool(routing.weights[2].isnan().all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(routing.weights[others], expected.weights[others])
    assert torch.equal(experts_of(routing)[others], experts_of(expected)[others])


def counted(*counts: int) -> Routing:
    """Tokens with one expert each, so many of each expert, in an order of their own."""
    total = sum(counts)
    routing = empty_routing(total, 1, len(counts))
    routing.offsets[:] = torch.tensor([0, *counts]).cumsum(0)
    routing.order[:] = torch.randperm(total)
    routing.places[routing.order.long(), 0] = torch.arange(total, dtype=torch.int32)
    return routing


COUNTS = [(1, 0, 0), (0, 2, 1), (3, 5, 0, 7, 16), (17, 0, 33), (64, 1, 2), (0, 0)]
SHAPES = [(64, 64), (16, 32), (130, 96), (77, 256), (1, 1), (33, 50), (99, 259)]


def errors_of(x: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """product_errors where so many rows of x, one expert's after the other's, are multiplied."""
    all_rows = zip(x.split(list(counts)), weights, strict=True)
    return torch.cat([oracle.product_errors(rows, weight) for rows, weight in all_rows])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_grouped_linears(n: int, k: int, dtype: torch.dtype) -> None:
    for counts in COUNTS:
        torch.manual_seed(n)
        routing = counted(*counts)
        x = torch.randn(sum(counts), k).to(dtype)
        gate_up, down = torch.randn(len(counts), 2 * n, k), torch.randn(len(counts), n, k)
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        out, plain = torch.full((2, sum(counts), n), torch.nan, dtype=dtype)
        in_order = x[routing.order.long()]
        placed = routing.order, routing.offsets, torch.empty_like(x)
        torch.ops.pyserve.grouped_linear_silu_mul(x, gate_up, *placed, out)
        reference.grouped_linear_silu_mul(x, gate_up, *placed, plain)
        experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        sums = torch.einsum("rk,rnk->rn", in_order.double(), gate_up[experts].double())
        errors = oracle.silu_mul_errors(sums, errors_of(in_order, gate_up, counts))
        oracle.assert_ratio(out, plain, oracle.silu_mul(sums), sum_errors=errors)
        most = max(counts)
        torch.ops.pyserve.grouped_linear(in_order, down, routing.offsets, most, out)
        reference.grouped_linear(in_order, down, routing.offsets, most, plain)
        sums = torch.einsum("rk,rnk->rn", in_order.double(), down[experts].double())
        errors = errors_of(in_order, down, counts)
        oracle.assert_ratio(out, plain, sums, sum_errors=errors)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_row_is_what_linear_makes_of_it(dtype: torch.dtype) -> None:
    """Alone, among others, on any number of threads, by the op or by the wrapper."""
    torch.manual_seed(1)
    counts = (3, 0, 1, 12, 7, 2)
    routing, x = counted(*counts), torch.randn(sum(counts), 512).to(dtype)
    weight = torch.randn(len(counts), 2 * 300, 512).to(dtype)
    expected = torch.empty(sum(counts), 300, dtype=dtype)
    for expert, (begin, end) in enumerate(pairwise(routing.offsets.tolist())):
        for row in range(begin, end):
            one = x[routing.order[row], None]
            torch.ops.pyserve.linear_silu_mul(one, weight[expert], None, expected[row, None])
    num_threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = torch.full_like(expected, torch.nan)
            grouped_linear_silu_mul(x, weight, routing, out, torch.empty_like(x))
            assert torch.equal(out, expected)
    finally:
        torch.set_num_threads(num_threads)
    wide = torch.full((sum(counts), 310), torch.nan, dtype=dtype)
    grouped_linear_silu_mul(x, weight, routing, wide[:, 5:305], torch.empty_like(x))
    assert torch.equal(wide[:, 5:305], expected)
    assert bool(wide[:, :5].isnan().all()) and bool(wide[:, 305:].isnan().all())


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_experts_with_many_rows(dtype: torch.dtype) -> None:
    """More than the op is made for, and than torch gets at once."""
    torch.manual_seed(2)
    routing, num_rows = counted(2, CHUNK_ROWS + 30, 0, 90), CHUNK_ROWS + 122
    x, weight = torch.randn(num_rows, 64).to(dtype), torch.randn(4, 96, 64).to(dtype)
    out, plain = torch.full((2, num_rows, 48), torch.nan, dtype=dtype)
    grouped_linear_silu_mul(x, weight, routing, out, torch.full_like(x, torch.nan))
    in_order = x[routing.order.long()]
    reference.grouped_linear_silu_mul(
        x, weight, routing.order, routing.offsets, torch.empty_like(x), plain
    )
    experts = torch.arange(4).repeat_interleave(torch.tensor((2, CHUNK_ROWS + 30, 0, 90)))
    sums = torch.einsum("rk,rnk->rn", in_order.double(), weight[experts].double())
    # Where torch multiplies, gate and up are rounded before they are activated.
    rounded = ops.silu_mul(sums.to(dtype))
    oracle.assert_ratio(out, rounded, oracle.silu_mul(sums), plain_float32_error=2e-2)
    oracle.assert_ratio(plain, plain, oracle.silu_mul(sums))
    out, plain = torch.full((2, num_rows, 96), torch.nan, dtype=dtype)
    grouped_linear(in_order, weight, routing, out)
    reference.grouped_linear(in_order, weight, routing.offsets, num_rows, plain)
    oracle.assert_ratio(out, plain, sums)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("width", [1, 16, 50, 259])
def test_combine(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    num_tokens, top_k = 7, 3
    slots = torch.arange(num_tokens)
    slots[4] = -1
    for has_gate in (False, True):
        x, router = torch.randn(num_tokens, 16), torch.randn(NUM_EXPERTS + has_gate, 16)
        routing = routed(x, router, top_k=top_k, slots=slots, has_gate=has_gate)
        rows = torch.full((num_tokens * top_k, width), torch.nan)
        rows[: 6 * top_k] = torch.randn(6 * top_k, width)  # behind them nobody reads
        rows, shared = rows.to(dtype), torch.randn(num_tokens, width).to(dtype)
        residual = torch.randn(num_tokens, width).to(dtype)
        weights = routing.weights.double()
        exact = torch.zeros(num_tokens, width).double()
        for token in range(num_tokens):
            for j, place in enumerate(routing.places[token].tolist()):
                exact[token] += weights[token, j] * rows[place].double() if place >= 0 else 0.0
        assert not bool(exact[4].any())
        for given in (None, shared)[has_gate:]:
            wanted = exact
            if given is not None:
                gate = weights[:, -1:] if has_gate else 1.0
                wanted = exact + gate * given.double()
            for is_adding in (False, True):
                out, plain = residual.clone(), residual.clone()
                combine_experts(rows, routing, given, out, is_adding=is_adding)
                reference.combine_experts(
                    rows, routing.places, routing.weights, given, is_adding, plain
                )
                added = residual.double() if is_adding else 0.0
                oracle.assert_ratio(out, plain, wanted + added)


def test_no_tokens() -> None:
    routing = routed(torch.empty(0, 16), torch.randn(NUM_EXPERTS, 16))
    assert routing.offsets.tolist() == [0] * (NUM_EXPERTS + 1)
    out = torch.empty(0, 4)
    grouped_linear_silu_mul(
        torch.empty(0, 16), torch.randn(NUM_EXPERTS, 8, 16), routing, out, torch.empty(0, 16)
    )
    grouped_linear(torch.empty(0, 4), torch.randn(NUM_EXPERTS, 16, 4), routing, torch.empty(0, 16))
    combine_experts(torch.empty(0, 16), routing, None, torch.empty(0, 16), is_adding=True)
    all_padding = routed(
        torch.randn(2, 16), torch.randn(NUM_EXPERTS, 16), slots=torch.tensor([-1, -1])
    )
    assert all_padding.offsets.tolist() == [0] * (NUM_EXPERTS + 1)
    grouped_linear(
        torch.randn(4, 8), torch.randn(NUM_EXPERTS, 16, 8), all_padding, torch.empty(4, 16)
    )


def test_refusals() -> None:
    x, router = torch.randn(2, 8), torch.randn(4, 8)
    rule = Rule()
    with pytest.raises(RuntimeError, match="5 of 4 experts a token"):
        routed(x, router, rule, top_k=5)
    with pytest.raises(RuntimeError, match=r"3 groups do not divide 4 experts"):
        routed(x, router, replace(rule, num_groups=3))
    too_many = limits.MAX_EXPERT_GROUPS + 1
    with pytest.raises(RuntimeError, match=f"{too_many} groups .* or are more than"):
        routed(x, torch.randn(too_many, 8), replace(rule, num_groups=too_many))
    with pytest.raises(RuntimeError, match="3 experts out of 1 of 2 groups"):
        routed(x, router, replace(rule, num_groups=2), top_k=3)
    with pytest.raises(RuntimeError, match="size 1 of router is 7, expected 8"):
        routed(x, router[:, :7].contiguous())
    with pytest.raises(RuntimeError, match="router is BFloat16, x is Float"):
        routed(x, router.bfloat16())
    too_many = limits.MAX_EXPERTS + 1
    with pytest.raises(RuntimeError, match=f"{too_many} experts, the limit is"):
        routed(x, torch.randn(too_many, 8))
    with pytest.raises(RuntimeError, match="33 of 64 experts a token, the limit is 32"):
        routed(x, torch.randn(64, 8), top_k=limits.MAX_TOP_EXPERTS + 1)
    routing = counted(1, 1)
    with pytest.raises(RuntimeError, match="size 2 of weight is 7, expected 8"):
        grouped_linear(x, torch.randn(2, 3, 7), routing, torch.empty(2, 3))
    with pytest.raises(RuntimeError, match="size 0 of offsets is 3, expected 4"):
        torch.ops.pyserve.grouped_linear(
            x, torch.randn(3, 3, 8), routing.offsets, 2, torch.empty(2, 3)
        )
    routing.offsets[-1] = 3
    with pytest.raises(RuntimeError, match="offsets from 0 to 3 for 2 rows"):
        torch.ops.pyserve.grouped_linear(
            x, torch.randn(2, 3, 8), routing.offsets, 2, torch.empty(2, 3)
        )
    routing = counted(2, 0)
    with pytest.raises(RuntimeError, match="expert 0 has 2 rows, at most 1"):
        torch.ops.pyserve.grouped_linear(
            x, torch.randn(2, 3, 8), routing.offsets, 1, torch.empty(2, 3)
        )
    routing = counted(1, 1)
    routing.places[1] = 2
    with pytest.raises(RuntimeError, match="places holds 2, of 2 rows"):
        combine_experts(x, routing, None, torch.empty(2, 8), is_adding=False)
