"""Equal calls give equal bits, whatever else runs on the card: what reads memory too early, or
frees it too early, is seen here, if at all.

Each call stands behind a kernel that makes its x anew, over NaN, and lets the next one start at
once. Beside it products of several sizes on a stream of their own take the SMs away, so that the
CTAs of a call start at different times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.w4a16 import TILINGS
from bench.w8a8 import TILINGS as W8A8_TILINGS
from pyserve import ops
from pyserve.ops.lora import LinearLora, linear_lora, serves_linear_lora
from tests.gpu.test_attention import TENSORS, allocate, fill, make_on_card
from tests.gpu.test_experts import counted
from tests.gpu.test_linear_fp8 import make as make_fp8
from tests.gpu.test_linear_lora import GROUP_SIZES, adapters_of, lengths_of, max_rows, weight_of
from tests.gpu.test_linear_w4a16 import make_packed
from tests.ops.lora_cases import make_case, starts_of

CARD = torch.device("cuda")
DTYPE = torch.bfloat16
STORE, _, SILU_MUL = range(3)  # Epilogue in cuda/common/epilogue.h; ADD reads what it writes
REPEATS, GROUP = 300, 50  # calls, and those of which all results are kept until they are compared


class Call(NamedTuple):
    """`run` computes something of x [rows, columns] into an out of this shape, all of it."""

    x: Tensor
    shape: tuple[int, ...]
    run: Callable[[Tensor], object]


@pytest.fixture(scope="module")
def keep_busy() -> Iterator[Callable[[int], None]]:
    """Starts a product on another stream, the i-th of those that follow each other."""
    stream = torch.cuda.Stream()
    operands = [torch.randn(size, size, device=CARD).to(DTYPE) for size in (256, 3072, 1024)]
    results = [torch.empty_like(operand) for operand in operands]
    torch.cuda.synchronize()

    def start(i: int) -> None:
        operand, result = operands[i % 3], results[i % 3]
        with torch.cuda.stream(stream):
            torch.mm(operand, operand, out=result)

    yield start
    torch.cuda.synchronize()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=CARD).to(DTYPE)


def check(call: Call, keep_busy: Callable[[int], None]) -> None:
    source = randn(len(call.x), 2 * call.x.shape[1])
    ops.silu_mul(source, call.x)
    first = torch.full(call.shape, torch.nan, dtype=DTYPE, device=CARD)
    torch.cuda.synchronize()
    call.run(first)
    assert bool(first.isfinite().all()), "the call that was alone left something out"
    for begin in range(0, REPEATS, GROUP):
        outs = torch.full((GROUP, *call.shape), torch.nan, dtype=DTYPE, device=CARD)
        for i, out in enumerate(outs):
            keep_busy(begin + i)
            call.x.fill_(torch.nan)
            ops.silu_mul(source, call.x)
            call.run(out)
        differs = (outs.view(torch.int16) != first.view(torch.int16)).flatten(1).sum(1)
        bad = differs.nonzero().flatten().tolist()
        assert not bad, f"calls {[begin + i for i in bad]}: {differs[bad].tolist()} results differ"


def w4a16_call(num_rows: int, n: int, k: int, group_size: int, epilogue: int = STORE) -> Call:
    packed, x = make_packed(n, k, group_size, DTYPE), randn(num_rows, k)
    bias = randn(n)
    op = torch.ops.pyserve.linear_w4a16
    width = n // 2 if epilogue == SILU_MUL else n
    return Call(x, (num_rows, width), lambda out: op(x, packed, bias, out, epilogue))


@pytest.mark.parametrize("num_rows", [1, 16, 24, 64, 200])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(24, 384, 64), (64, 256, 128), (1088, 1984, 32), (4096, 4096, 128)]
)
def test_4_bit_integers(
    n: int, k: int, group_size: int, num_rows: int, keep_busy: Callable[[int], None]
) -> None:
    check(w4a16_call(num_rows, n, k, group_size), keep_busy)
    if n % 32 == 0:
        check(w4a16_call(num_rows, n, k, group_size, SILU_MUL), keep_busy)


@pytest.mark.parametrize("epilogue", [STORE, SILU_MUL])
@pytest.mark.parametrize(("k", "group_size"), [(1088, 64), (1152, 128)])
def test_every_tiling_of_4_bit_integers(
    k: int, group_size: int, epilogue: int, keep_busy: Callable[[int], None]
) -> None:
    call = w4a16_call(150, 832, k, group_size, epilogue)
    packed = make_packed(64, 256, 128, DTYPE)
    try:
        for number in range(1, len(TILINGS) + 1):
            torch.ops.pyserve.try_linear_w4a16(packed, -1, number)
            check(call, keep_busy)
    finally:
        torch.ops.pyserve.try_linear_w4a16(packed, -1)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_rows", [1, 8])
def test_adapters(num_rows: int, group_size: int, keep_busy: Callable[[int], None]) -> None:
    if num_rows > max_rows(group_size):
        pytest.skip("more rows than the kernel takes")
    for k, *sizes in ((4096, 4096, 1024, 1024), (14336, 4096)):
        case = make_case([[16] * len(sizes)] * 8, sizes, k, 16, DTYPE, "cuda")
        starts, x = starts_of(*lengths_of(num_rows, 8)).to(CARD), randn(num_rows, k)
        weight, _ = weight_of(sum(sizes), k, group_size, DTYPE)
        adapters = adapters_of(case, starts, x)
        if not serves_linear_lora(x, weight, x.new_empty(num_rows, sum(sizes)), STORE, adapters):
            assert (k, group_size, num_rows) == (14336, 64, 8), "no room beside x"
            continue

        def run(
            out: Tensor, x: Tensor = x, weight: Tensor = weight, adapters: LinearLora = adapters
        ) -> None:
            linear_lora(x, weight, None, out, STORE, adapters)

        check(Call(x, (num_rows, sum(sizes)), run), keep_busy)


@pytest.mark.parametrize("num_rows", [1, 8, 16, 40])
def test_8_bit_floats(num_rows: int, keep_busy: Callable[[int], None]) -> None:
    for n, k, *scale in ((320, 832, 128, 128), (4096, 4096, 1, 4096)):
        matrix, x, bias = make_fp8(n, k, *scale), randn(num_rows, k), randn(n)

        def run(out: Tensor, x: Tensor = x, args: tuple[object, ...] = (*matrix, bias)) -> None:
            torch.ops.pyserve.linear_fp8(x, *args, out)

        check(Call(x, (num_rows, n), run), keep_busy)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="other cards have no kernel for it",
)
@pytest.mark.parametrize("num_rows", [24, 300])
def test_8_bit_floats_by_rows_rounded(num_rows: int, keep_busy: Callable[[int], None]) -> None:
    """Each tiling; all calls round x in the same memory, some in two passes."""
    n, k = 832, 1088
    matrix, x, bias = make_fp8(n, k, 128, 128), randn(num_rows, k), randn(n)
    scratch = randn(100 * k)

    def run(out: Tensor) -> None:
        torch.ops.pyserve.linear_w8a8(x, *matrix, bias, out, scratch)

    try:
        for number in range(len(W8A8_TILINGS) + 1):
            torch.ops.pyserve.try_linear_w8a8(matrix.weight, -1, number)
            check(Call(x, (num_rows, n), run), keep_busy)
    finally:
        torch.ops.pyserve.try_linear_w8a8(matrix.weight, -1)


@pytest.mark.parametrize("num_rows", [1, 8, 24, 128, 200, 300])
def test_16_bits(num_rows: int, keep_busy: Callable[[int], None]) -> None:
    """The kernels that serve the epilogue which 65 rows and more have one for."""
    n, k = 8192, 3072
    x, weight, bias = randn(num_rows, k), randn(2 * n, k) / 32, randn(2 * n)
    if not torch.ops.pyserve.serves_linear(weight, num_rows, SILU_MUL):
        pytest.skip("cuBLAS is faster here")
    op = torch.ops.pyserve.linear_silu_mul
    check(Call(x, (num_rows, n), lambda out: op(x, weight, bias, out)), keep_busy)


@pytest.mark.parametrize("counts", [(1, 0, 3, 4), (17, 0, 16), (70, 90), (1000, 5, 0, 700)])
def test_experts(counts: tuple[int, ...], keep_busy: Callable[[int], None]) -> None:
    n, k, total = 768, 2048, sum(counts)
    routing, x, room = counted(*counts), randn(total, k), randn(total, k)
    gate_up, down = randn(len(counts), 2 * n, k) / 32, randn(len(counts), n, k) / 32
    order, offsets, native = routing.order, routing.offsets, torch.ops.pyserve

    def first(out: Tensor) -> None:
        native.grouped_linear_silu_mul(x, gate_up, order, offsets, room, out)

    def second(out: Tensor) -> None:
        native.grouped_linear(x, down, offsets, total, out)

    for run in (first, second):
        check(Call(x, (total, n), run), keep_busy)


DECODE = [(1, 9000), (1, 5), (2, 1500), (1, 64)]
PREFILL = [(70, 2000), (300, 300), (900, 1000), (1, 4000), (17, 17)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_attention_that_is_split(
    rows: list[tuple[int, int]], head_dim: int, keep_busy: Callable[[int], None]
) -> None:
    case = make_on_card(rows, num_heads=16, num_kv_heads=2, head_dim=head_dim)
    plan = fill(case, allocate(case))
    given = [getattr(case, name) for name in TENSORS]
    longest = max(query_len for query_len, _ in rows)
    rest = case.scale, case.window, longest, plan.work, plan.workspace

    def run(out: Tensor) -> None:
        torch.ops.pyserve.paged_attention(*given, *rest, out, case.softcap)

    check(Call(case.q.flatten(1), tuple(case.q.shape), run), keep_busy)
