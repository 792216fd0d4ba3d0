"""grouped_linear_w4a16 and grouped_linear_fp8: each row by its expert's matrix, as the op of one
matrix has it; many rows of an expert by plain numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import experts, fp8, quantised, reference, w4a16
from tests.ops import oracle

NUM_EXPERTS, TOP_K = 5, 2
Matrices = quantised.W4A16Matrix | quantised.Fp8Matrix


def integers(n: int, k: int) -> quantised.W4A16Matrix:
    packed = torch.zeros(NUM_EXPERTS, *w4a16.packed_shape(n, k, 32), dtype=torch.int32)
    for index, one in enumerate(packed):
        w4a16.fill_with_noise(one, n, k, 0.1, torch.Generator().manual_seed(index))
    return quantised.W4A16Matrix(packed)


def floats(n: int, k: int) -> quantised.Fp8Matrix:
    weight = torch.empty(NUM_EXPERTS, n, k, dtype=fp8.E4M3)
    fp8.fill_with_noise(weight, torch.Generator().manual_seed(0))
    scales = (torch.rand(NUM_EXPERTS, -(-n // 16), -(-k // 64)) + 0.5) / 640
    return quantised.Fp8Matrix(weight.view(torch.uint8), scales, 16, 64)


KINDS: dict[str, Callable[[int, int], Matrices]] = {"w4a16": integers, "fp8": floats}


def routing_of(counts: list[int], num_tokens: int) -> experts.Routing:
    """So many rows of each expert: every token goes to TOP_K, in some order."""
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    order = torch.randperm(num_tokens * TOP_K, generator=torch.Generator().manual_seed(1)).int()
    empty = torch.empty(0)
    places = torch.zeros(num_tokens, TOP_K, dtype=torch.int32)
    return experts.Routing(empty, empty, places, order, offsets)


def by_twin(
    x: Tensor, matrix: Matrices, order: Tensor | None, offsets: Tensor, max_group: int, out: Tensor
) -> None:
    if isinstance(matrix, quantised.W4A16Matrix):
        reference.grouped_linear_w4a16(x, *matrix, order, offsets, max_group, None, out)
    else:
        reference.grouped_linear_fp8(x, *matrix, order, offsets, max_group, out)


def plain(matrix: Matrices, n: int, k: int) -> Tensor:
    if isinstance(matrix, quantised.Fp8Matrix):
        return fp8.dequantised(*matrix)
    return torch.stack([w4a16.dequantised(one, n, k) for one in matrix.packed])


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[0, 3, 1, 0, 6], [0, 0, 0, 0, 0], [10, 0, 0, 0, 0]])
def test_rows_by_their_experts(kind: str, counts: list[int], dtype: torch.dtype) -> None:
    """Of as many rows as there are assignments, or fewer: padding stays as it was."""
    n, k, num_tokens = 48, 160, 5
    torch.manual_seed(0)
    routing = routing_of(counts, num_tokens)
    down, gate_up = KINDS[kind](n, k), KINDS[kind](2 * n, k)
    x = torch.randn(num_tokens * TOP_K, k).to(dtype)
    out, twin = torch.full((2, len(x), n), 9.0, dtype=dtype)
    down.multiply_grouped(x, None, routing.offsets, num_tokens * TOP_K, None, out)
    by_twin(x, down, None, routing.offsets, num_tokens * TOP_K, twin)
    exact = torch.full_like(out, 9.0, dtype=torch.float64)
    weights, bounds = plain(down, n, k).double(), routing.offsets.tolist()
    for expert, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        exact[begin:end] = x[begin:end].double() @ weights[expert].T
        one = torch.empty(end - begin, n, dtype=dtype)
        down.of_expert(expert).multiply(x[begin:end], None, one, ops.STORE)
        assert torch.equal(out[begin:end], one), "what else is there changes nothing"
    oracle.assert_ratio(out, twin, exact)
    if max(counts) > num_tokens:
        return  # no expert has a token twice
    tokens = x[:num_tokens]
    out, twin = torch.full((2, len(x), n), 9.0, dtype=dtype)
    gate_up.multiply_grouped(tokens, routing.order, routing.offsets, num_tokens, None, out)
    by_twin(tokens, gate_up, routing.order, routing.offsets, num_tokens, twin)
    rows = tokens[routing.order.long() // TOP_K].double()
    weights = plain(gate_up, 2 * n, k).double()
    for expert, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        exact[begin:end] = oracle.silu_mul(rows[begin:end] @ weights[expert].T)
    oracle.assert_ratio(out, twin, exact)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_of_an_expert(kind: str, dtype: torch.dtype) -> None:
    """One with more than are multiplied at once, of which plain numbers are made first."""
    n, k, num_tokens = 32, 128, 300
    torch.manual_seed(0)
    routing = routing_of([1, 299, 0, 300, 0], num_tokens)
    x = torch.randn(num_tokens, k).to(dtype)
    gate_up, down = KINDS[kind](2 * n, k), KINDS[kind](k, n if kind == "w4a16" else 64)
    scratch = torch.full((32 * k,), float("nan"), dtype=dtype)
    sorted_x, out = torch.empty(len(routing.order), k, dtype=dtype), torch.empty(600, n).to(dtype)
    quantised.grouped_linear_silu_mul(x, gate_up, routing, out, sorted_x, scratch)
    rows = x[routing.order.long() // TOP_K]
    assert torch.equal(sorted_x, rows)
    wide = out if kind == "w4a16" else torch.cat((out, out), 1)
    made = torch.empty(600, k, dtype=dtype)
    quantised.grouped_linear(wide, down, routing, made, scratch)
    bounds = routing.offsets.tolist()
    of_both = plain(gate_up, 2 * n, k), plain(down, k, wide.shape[1])
    for expert, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        first, second = (weights[expert] for weights in of_both)
        exact = oracle.silu_mul(rows[begin:end].double() @ first.double().T)
        rounded = ops.silu_mul(torch.nn.functional.linear(rows[begin:end], first.to(dtype)))
        oracle.assert_ratio(out[begin:end], rounded, exact, plain_float32_error=2e-2)
        exact = wide[begin:end].double() @ second.double().T
        rounded = torch.nn.functional.linear(wide[begin:end], second.to(dtype))
        oracle.assert_ratio(made[begin:end], rounded, exact, plain_float32_error=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_an_error(kind: str) -> None:
    n, k = 32, 128
    matrix, x, out = KINDS[kind](n, k), torch.randn(4, k), torch.empty(4, n)
    routing = routing_of([0, 1, 0, 3, 0], 4)
    offsets = routing.offsets
    for args, words in [
        ((x, None, offsets[:-1], 4, out), "size 0 of (packed|weight) is 5, expected 4"),
        ((x, None, offsets, 2, out), "expert 3 has 3 rows, at most 2"),
        ((x, None, offsets + 3, 4, out), "offsets from 3 to 7 for 4 rows"),
        ((x[:2], None, offsets, 4, out), "size 0 of x is 2, expected 4"),
        ((x, None, offsets, 4, torch.empty(4, 300)), "300"),
        ((x, routing.order, offsets, 4, out), "size 0 of order is 8, expected 4"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            matrix.multiply_grouped(*args[:-1], None, args[-1])
