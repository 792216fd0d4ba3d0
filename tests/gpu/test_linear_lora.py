"""linear_lora on CUDA, a linear and what adapters add to it in one kernel: ratio rule by number of
rows, ranks, parts and epilogues; a row's result depends on nothing but the row; launches that
follow each other do not disturb the next; a graph is replayed with other tokens. That equal calls
give equal bits: test_repeats.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyserve.ops import ADD, SILU_MUL, STORE, lora, reference, w4a16
from tests.gpu.test_linear_w4a16 import make_packed
from tests.ops import oracle
from tests.ops.lora_cases import (
    EPS,
    NAN,
    Case,
    exactly,
    make_case,
    squares_of,
    starts_of,
)

CARD = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
GROUP_SIZES = (0, 32, 64, 128)  # 0: plain numbers
SLOTS: list[list[list[int]]] = [  # ranks by slot and part
    [[16, 16, 16]], [[1, 0, 5], [8, 16, 3], [0, 0, 0], [16, 1, 16]], [[16, 8, 16]] * 8,
    [[16, 61, 64], [3, 64, 0]], [[100, 16, 256]],
]  # fmt: skip


def max_rows(group_size: int) -> int:
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    return lora.MAX_LINEAR_ROWS if group_size == 0 or is_hopper else 0


def weight_of(n: int, k: int, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As the op takes it, and as numbers."""
    if group_size == 0:
        weight = (torch.randn(n, k, device=CARD) / 32).to(dtype)
        return weight, weight.double()
    packed = make_packed(n, k, group_size, dtype)
    return packed, w4a16.dequantised(packed, n, k).double()


def adapters_of(case: Case, starts: Tensor, x: Tensor) -> lora.LinearLora:
    """With what lora_shrink makes of x, that no norm is a factor of."""
    shape = lora.num_splits(len(x), x.device), len(x), *case.a.shape[1:3]
    shrunk = torch.full(shape, NAN, device=x.device)
    lora.lora_shrink(x, case.a, starts, case.ranks, case.scales, shrunk)
    return lora.LinearLora(shrunk, case.b, starts, case.ranks, case.columns)


def lengths_of(num_rows: int, num_slots: int) -> list[int]:
    """A row without an adapter where there are more than one, then the slots', evenly."""
    rest = num_rows - (num_rows > 1)
    each = [rest * (s + 1) // num_slots - rest * s // num_slots for s in range(num_slots)]
    return [num_rows - rest, *each]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_rows", [1, 2, 4, pytest.param(7, marks=pytest.mark.sanitize), 8])
@pytest.mark.parametrize("slots", range(len(SLOTS)))
def test_sums(slots: int, num_rows: int, group_size: int, dtype: torch.dtype) -> None:
    """Every epilogue, with a norm before or behind it."""
    if num_rows > max_rows(group_size):
        pytest.skip("more rows than the kernel takes")
    ranks = SLOTS[slots]
    max_rank = -(-max(map(max, ranks)) // 8) * 8
    starts = starts_of(*lengths_of(num_rows, len(ranks))).to(CARD)
    for epilogue, sizes, k in (
        (STORE, [512, 128, 160], 4096), (STORE, [500, 37, 128], 256), (ADD, [3264], 1920),
        (SILU_MUL, [1920, 1920], 2560), (SILU_MUL, [2176], 512),
    ):  # fmt: skip
        torch.manual_seed(num_rows)
        case = make_case([own[: len(sizes)] for own in ranks], sizes, k, max_rank, dtype, "cuda")
        n = sum(sizes) // (2 if epilogue == SILU_MUL else 1)
        weight, numbers = weight_of(sum(sizes), k, group_size, dtype)
        x, bias = (
            torch.randn(size, device=CARD).to(dtype) for size in ((num_rows, k), (sum(sizes),))
        )
        wide = torch.randn(num_rows, n + 8, device=CARD).to(dtype)
        before, out = wide.clone(), wide[:, :n]
        adapters = adapters_of(case, starts, x)
        if not lora.serves_linear_lora(x, weight, out, epilogue, adapters):
            assert max_rank > 16, "what a server has by default must be served"
            continue
        squares = None if epilogue == ADD else squares_of(x)
        zeros = torch.zeros(num_rows, sum(sizes), device=CARD)
        factor = torch.ones(1, dtype=torch.float64, device=CARD)
        if squares is not None:
            factor = (squares.double().sum(1, keepdim=True) / k + EPS).rsqrt()
        exact = exactly(case, x, starts, zeros, squares) + x.double() @ numbers.T * factor
        exact += bias.double()
        if epilogue == ADD:
            exact += out.double()
        elif epilogue == SILU_MUL:
            exact = oracle.silu_mul(exact)
        plain = out.clone()
        reference.linear_lora(x, weight, bias, plain, epilogue, *adapters, squares, EPS)
        lora.linear_lora(x, weight, bias, out, epilogue, adapters, squares, EPS)
        oracle.assert_ratio(out, plain, exact, plain_float32_error=1e-5)
        assert torch.equal(wide[:, n:], before[:, n:])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_rows", [1, 8])
def test_a_norm_that_follows(num_rows: int, group_size: int) -> None:
    if num_rows > max_rows(group_size):
        pytest.skip("more rows than the kernel takes")
    n, k, dtype = 4096, 1024, torch.bfloat16
    case = make_case([[16], [5]], [n], k, 16, dtype, "cuda")
    starts = starts_of(*lengths_of(num_rows, 2)).to(CARD)
    weight, _ = weight_of(n, k, group_size, dtype)
    x, residual = torch.randn(num_rows, k, device=CARD).to(dtype), torch.randn(num_rows, n).to(CARD)
    out, norm_weight = residual.to(dtype), torch.randn(n, device=CARD).to(dtype)
    scaled, squares = torch.empty_like(out), torch.empty(num_rows, n // 16, device=CARD)
    adapters = adapters_of(case, starts, x)
    norm = norm_weight, scaled, squares
    lora.linear_lora(x, weight, None, out, ADD, adapters, None, 0.0, *norm)
    alone = residual.to(dtype)
    lora.linear_lora(x, weight, None, alone, ADD, adapters)
    assert torch.equal(out, alone)
    assert torch.equal(scaled, (out.float() * norm_weight.float()).to(dtype))
    exact = out.double().square().view(num_rows, -1, 16).sum(2)
    torch.testing.assert_close(squares.double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_row_does_not_depend_on_its_batch_mates(group_size: int) -> None:
    """Nor on the number of rows, whatever kernel that chooses."""
    if max_rows(group_size) == 0:
        pytest.skip("of Hopper alone")
    dtype, sizes, k = torch.bfloat16, [2048, 320], 4096
    case = make_case([[16, 8], [7, 16]], sizes, k, 16, dtype, "cuda")
    weight, _ = weight_of(sum(sizes), k, group_size, dtype)
    longest = max_rows(group_size)
    x = torch.randn(longest, k, device=CARD).to(dtype)
    shrunk = adapters_of(case, starts_of(1, 4, longest - 5).to(CARD), x).shrunk
    together = torch.full((longest, sum(sizes)), NAN, dtype=dtype, device=CARD)
    for num_rows in (longest, 6, 1):
        starts = starts_of(1, 4, num_rows - 5) if num_rows > 1 else starts_of(1, 0, 0)
        out = torch.full((num_rows, sum(sizes)), NAN, dtype=dtype, device=CARD)
        rest = case.b, starts.to(CARD), case.ranks, case.columns
        adapters = lora.LinearLora(shrunk[:, :num_rows], *rest)
        lora.linear_lora(x[:num_rows], weight, None, out, STORE, adapters)
        if num_rows == longest:
            together.copy_(out)
        assert torch.equal(out, together[:num_rows])
    for row in (1, 5):
        starts = starts_of(0, 1, 0) if row == 1 else starts_of(0, 0, 1)
        out = torch.empty(1, sum(sizes), dtype=dtype, device=CARD)
        rest = case.b, starts.to(CARD), case.ranks, case.columns
        adapters = lora.LinearLora(shrunk[:, row : row + 1], *rest)
        lora.linear_lora(x[row : row + 1], weight, None, out, STORE, adapters)
        assert torch.equal(out[0], together[row])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_kernels_that_follow_each_other(group_size: int) -> None:
    """shrink and linear_lora in turn, each on what the one before made, in one room."""
    if max_rows(group_size) == 0:
        pytest.skip("of Hopper alone")
    dtype, sizes = torch.bfloat16, (128, 4096, 512, 1024, 64)
    cases, weights = [], []
    for k, n in zip(sizes, sizes[1:], strict=False):
        cases.append(make_case([[16], [9]], [n], k, 16, dtype, "cuda"))
        weights.append(weight_of(n, k, group_size, dtype)[0])
    starts = starts_of(1, 3, 4).to(CARD)
    x = torch.randn(8, sizes[0], device=CARD).to(dtype)
    rooms = [torch.empty(8, n, dtype=dtype, device=CARD) for n in sizes[1:]]
    shrunk = torch.full((lora.MAX_SPLITS, 8, 1, 16), NAN, device=CARD)

    def chain(is_alone: bool) -> Tensor:
        given = x
        for case, weight, out in zip(cases, weights, rooms, strict=True):
            lora.lora_shrink(given, case.a, starts, case.ranks, case.scales, shrunk)
            if is_alone:
                torch.cuda.synchronize()
            adapters = lora.LinearLora(shrunk, case.b, starts, case.ranks, case.columns)
            lora.linear_lora(given, weight, None, out, STORE, adapters)
            if is_alone:
                torch.cuda.synchronize()
            given = out
        return given.clone()

    expected = chain(is_alone=True)
    assert bool(expected.isfinite().all())
    for _ in range(200):
        assert torch.equal(chain(is_alone=False), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_graph_follows_the_starts(group_size: int) -> None:
    """The shapes are recorded, the segments are read when it is replayed. Where nobody uses an
    adapter the bits are those of the linear alone."""
    if max_rows(group_size) == 0:
        pytest.skip("of Hopper alone")
    dtype, sizes, k = torch.bfloat16, [4096, 1024, 1024], 4096
    case = make_case([[16, 16, 16], [8, 16, 0]], sizes, k, 16, dtype, "cuda")
    weight, _ = weight_of(sum(sizes), k, group_size, dtype)
    x, starts = torch.randn(8, k, device=CARD).to(dtype), starts_of(0, 8, 0).to(CARD)
    out = torch.empty(8, sum(sizes), dtype=dtype, device=CARD)
    adapters = adapters_of(case, starts, x)

    def call() -> None:
        for _ in range(3):
            lora.lora_shrink(x, case.a, starts, case.ranks, case.scales, adapters.shrunk)
            lora.linear_lora(x, weight, None, out, STORE, adapters)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    untouched = torch.empty_like(out)
    if group_size == 0:
        torch.ops.pyserve.linear(x, weight, None, untouched)
    else:
        torch.ops.pyserve.linear_w4a16(x, weight, None, untouched)
    for lengths in ((0, 8, 0), (4, 3, 1), (8, 0, 0), (0, 0, 1), (0, 1, 7)):
        starts.copy_(starts_of(*lengths))
        for _ in range(50):
            graph.replay()
        expected = torch.empty_like(out)
        lora.linear_lora(x, weight, None, expected, STORE, adapters_of(case, starts, x))
        assert torch.equal(out, expected)
        alone = [*range(lengths[0]), *range(sum(lengths), 8)]
        assert torch.equal(out[alone], untouched[alone])
        used = range(lengths[0], sum(lengths))
        assert not used or not torch.equal(out[list(used)], untouched[list(used)])


def test_what_is_not_served_is_refused() -> None:
    most = max_rows(0)
    for num_rows, max_rank, served in ((most, 16, True), (most + 1, 16, False), (8, 12, False)):
        case = make_case([[12]], [64], 256, max_rank, torch.bfloat16, "cuda")
        weight, _ = weight_of(64, 256, 0, torch.bfloat16)
        x = torch.randn(num_rows, 256, device=CARD).bfloat16()
        out = torch.zeros(num_rows, 64, device=CARD).bfloat16()
        adapters = adapters_of(case, starts_of(0, num_rows).to(CARD), x)
        assert lora.serves_linear_lora(x, weight, out, STORE, adapters) == served
        if not served:
            with pytest.raises(RuntimeError, match="linear_lora"):
                lora.linear_lora(x, weight, None, out, STORE, adapters)
