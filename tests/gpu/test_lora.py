"""lora_shrink, lora_expand and lora_expand_silu_mul on CUDA: ratio rule on odd shapes and ranks, by
segments, behind a norm and before an activation; a row's result depends on nothing but the row; a
graph of them is replayed with other tokens."""

from __future__ import annotations

import pytest
import torch

from pyserve.ops import lora
from tests.ops import oracle
from tests.ops.lora_cases import (
    EPS,
    NAN,
    exactly,
    make_case,
    run,
    run_twin,
    squares_of,
    starts_of,
)

DTYPES = (torch.bfloat16, torch.float16)
CASES: list[tuple[list[list[int]], list[int], int]] = [
    # ranks by slot and part, columns of the parts, k
    ([[16, 16, 16], [8, 64, 0], [0, 0, 0], [5, 1, 17]], [512, 128, 130], 4096),
    ([[64], [256]], [1000], 1032),
    ([[16, 16]] * 8, [640, 640], 2048),
    ([[3, 7]], [37, 5], 259),
]
WATCHED = [pytest.param(length, marks=pytest.mark.sanitize) for length in (3, 65, 700)]
LENGTHS = [1, *WATCHED, 16, 17, 64, 300, 2100]  # of a slot


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case_index", range(len(CASES)))
def test_sums(case_index: int, length: int, dtype: torch.dtype) -> None:
    ranks, sizes, k = CASES[case_index]
    torch.manual_seed(length)
    case = make_case(ranks, sizes, k, max(map(max, ranks)) + 8, dtype, "cuda")
    lengths = [2, *(length + slot for slot in range(len(ranks)))]
    starts = starts_of(*lengths).to("cuda")
    x = torch.randn(sum(lengths) + 3, k, device="cuda").to(dtype)
    wide = torch.randn(len(x), sum(sizes) + 4, device="cuda").to(dtype)
    before, out = wide.clone(), wide[:, : sum(sizes)]
    plain = out.clone()
    run_twin(case, x, starts, plain)
    exact = exactly(case, x, starts, out)
    run(case, x, starts, out)
    oracle.assert_ratio(out, plain, exact, plain_float32_error=1e-5)
    assert torch.equal(wide[:, sum(sizes) :], before[:, sum(sizes) :])
    assert torch.equal(wide[:2], before[:2])
    assert torch.equal(wide[sum(lengths) :], before[sum(lengths) :])


GATED: list[tuple[list[list[int]], list[int], int]] = [
    ([[16, 16], [0, 40], [0, 0], [8, 5]], [1792, 1792], 4096),
    ([[64], [17]], [1000], 1032),
    ([[3, 7]] * 2, [37, 37], 259),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case_index", range(len(GATED)))
def test_before_an_activation(
    case_index: int, length: int, has_norm: bool, dtype: torch.dtype
) -> None:
    """Of all tokens, also of those without an adapter; behind a norm that is a factor or not."""
    ranks, sizes, k = GATED[case_index]
    case = make_case(ranks, sizes, k, max(map(max, ranks)) + 8, dtype, "cuda")
    lengths = [2, *(length + slot for slot in range(len(ranks)))]
    starts, num_tokens = starts_of(*lengths).to("cuda"), sum(lengths) + 3
    x = torch.randn(num_tokens, k, device="cuda").to(dtype)
    gate_up = torch.randn(num_tokens, sum(sizes), device="cuda").to(dtype)
    x_squares = squares_of(x) if has_norm else None
    exact = oracle.silu_mul(exactly(case, x, starts, gate_up, x_squares))
    wide = torch.full((num_tokens, sum(sizes) // 2 + 8), NAN, dtype=dtype, device="cuda")
    plain, out = torch.empty_like(exact, dtype=dtype), wide[:, : sum(sizes) // 2]
    run_twin(case, x, starts, gate_up.clone(), activated=plain, x_squares=x_squares)
    run(case, x, starts, gate_up, activated=out, x_squares=x_squares)
    # The twin rounds gate and up before.
    oracle.assert_ratio(out, plain, exact, plain_float32_error=2 * torch.finfo(dtype).eps)
    assert bool(wide[:, sum(sizes) // 2 :].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_mates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = make_case([[16, 8], [40, 3]], [500, 30], 1024, 40, dtype, "cuda")
    x = torch.randn(61, 1024, device="cuda").to(dtype)
    y = torch.randn(61, 530, device="cuda").to(dtype)
    together = y.clone()
    num_splits = lora.MAX_SPLITS  # of any number of tokens; the order of a sum depends on it
    run(case, x, starts_of(3, 20, 38).to("cuda"), together, num_splits=num_splits)
    for row in (0, 3, 5, 22, 23, 40, 60):
        alone = y[row : row + 1].clone()
        starts = starts_of(row < 3, 3 <= row < 23, row >= 23).to("cuda")
        run(case, x[row : row + 1], starts, alone, num_splits=num_splits)
        assert torch.equal(alone[0], together[row])


def test_a_graph_follows_the_starts() -> None:
    """The shapes are recorded, the segments are read when it is replayed."""
    case = make_case([[16], [16]], [512], 512, 16, torch.bfloat16, "cuda")
    x = torch.randn(24, 512, device="cuda").bfloat16()
    starts, out = starts_of(0, 24, 0).to("cuda"), torch.zeros(24, 512, device="cuda").bfloat16()
    activated, squares = torch.empty(24, 256, device="cuda").bfloat16(), squares_of(x)
    shrunk = torch.full((lora.MAX_SPLITS, 24, 1, 16), NAN, device="cuda")

    def call() -> None:
        lora.lora_shrink(x, case.a, starts, case.ranks, case.scales, shrunk)
        rest = shrunk, case.b, starts, case.ranks, case.columns, out
        lora.lora_expand(*rest)
        lora.lora_shrink(x, case.a, starts, case.ranks, case.scales, shrunk, squares, EPS)
        lora.lora_expand_silu_mul(*rest, activated)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for lengths in ((0, 24, 0), (4, 3, 17), (24, 0, 0), (0, 0, 1)):
        starts.copy_(starts_of(*lengths))
        out.zero_()
        graph.replay()
        expected = torch.zeros_like(out)
        run(case, x, starts, expected)
        assert torch.equal(out, expected)
        also = torch.empty_like(activated)
        run(case, x, starts, expected.clone(), activated=also, x_squares=squares)
        assert torch.equal(activated, also)
