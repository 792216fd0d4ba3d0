"""4-bit integers on CUDA: every number of a matrix, products by slices of it, a checkpoint that is
loaded there, a step that is replayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.w4a16 import TILINGS
from pyserve import ops
from pyserve.model.config import ModelConfig
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.ops import quantised as ops_of_integers
from pyserve.ops import w4a16
from tests.model import quantised
from tests.ops import oracle

CARD = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
STORE, ADD, SILU_MUL = range(3)  # Epilogue in cuda/common/epilogue.h
SHAPES = [(64, 256, 128), (24, 384, 64), (35, 96, 32), (4096, 4096, 128), (6144, 1024, 64)]


def make_packed(n: int, k: int, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With scales as a checkpoint of this dtype has them: of float32 with 16 bits of mantissa,
    which the kernel for more than 16 rows on Hopper rounds to x's dtype."""
    shape = w4a16.packed_shape(n, k, group_size)
    packed = torch.zeros(shape, dtype=torch.int32, device=CARD)
    w4a16.fill_with_noise(packed, n, k, 0.02, torch.Generator(CARD).manual_seed(n + k))
    return with_scales_of(packed, dtype)


def with_scales_of(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The same matrix but for its scales, which are rounded to this dtype."""
    begin = packed.shape[2] // w4a16.BLOCK_WORDS * w4a16.BLOCK_WORDS
    rounded = packed.clone()
    records = rounded[..., begin:]
    scales = (records & ~w4a16.ZERO_MASK).view(torch.float32).to(dtype).float()
    records.copy_(scales.view(torch.int32) | records & w4a16.ZERO_MASK)
    return rounded


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_every_number(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    packed = make_packed(n, k, group_size)
    wide = torch.full((n, k + 8), float("nan"), dtype=dtype, device=CARD)
    torch.ops.pyserve.dequantise_w4a16(packed, wide[:, :k])
    assert torch.equal(wide[:, :k], w4a16.dequantised(packed, n, k).to(dtype))
    assert bool(wide[:, k:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 64, 300])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_linear(n: int, k: int, group_size: int, num_rows: int, dtype: torch.dtype) -> None:
    packed = make_packed(n, k, group_size, dtype)
    weight = w4a16.dequantised(packed, n, k)
    x, bias = torch.randn(num_rows, k, device=CARD).to(dtype), torch.randn(n, device=CARD).to(dtype)
    scratch = torch.full((max(16, n // 32 * 16) * k,), float("nan"), dtype=dtype, device=CARD)
    for given, linear in itertools.product((bias, None), (by_either, of_plain_numbers)):
        out = torch.full((num_rows, n), float("nan"), dtype=dtype, device=CARD)
        linear(x, packed, given, out, scratch)
        exact = x.double() @ weight.double().T + (0 if given is None else given.double())
        plain = torch.nn.functional.linear(x, weight.to(dtype), given)
        oracle.assert_ratio(out, plain, exact, plain_float32_error=1e-2)


def by_either(x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, scratch: Tensor) -> None:
    """By what is the fastest."""
    matrix = ops_of_integers.W4A16Matrix(packed)
    ops_of_integers.linear(x, matrix, bias, out, scratch)


def of_plain_numbers(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, scratch: Tensor
) -> None:
    """By slices of the matrix, whatever is the fastest."""
    torch.ops.pyserve.try_linear_w4a16(packed, 0)
    ops_of_integers._served.clear()
    try:
        by_either(x, packed, bias, out, scratch)
    finally:
        torch.ops.pyserve.try_linear_w4a16(packed, -1)
        ops_of_integers._served.clear()


def own(x: Tensor, packed: Tensor, bias: Tensor | None, out: Tensor, scratch: Tensor) -> None:
    """By the kernel of the integers, whatever is the fastest."""
    torch.ops.pyserve.linear_w4a16(x, packed, bias, out)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), [*SHAPES, (320, 14336, 128), (1040, 6208, 64)])
def test_the_kernel_of_few_rows(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """For every number of rows that it is made for; no row looks at another."""
    packed = make_packed(n, k, group_size)
    weight = w4a16.dequantised(packed, n, k)
    wide = torch.randn(16, k + 8, device=CARD).to(dtype)
    wide[:, k:] = float("nan")
    x, bias = wide[:, :k], torch.randn(n, device=CARD).to(dtype)
    exact = x.double() @ weight.double().T
    results = []
    for num_rows in range(1, 17):
        given = bias if num_rows % 2 else None
        out = torch.full((20, n + 4), float("nan"), dtype=dtype, device=CARD)
        torch.ops.pyserve.linear_w4a16(x[:num_rows], packed, given, out[:num_rows, :n])
        assert bool(out[num_rows:].isnan().all()) and bool(out[:, n:].isnan().all())
        added = exact[:num_rows] + (0 if given is None else given.double())
        plain = torch.nn.functional.linear(x[:num_rows], weight.to(dtype), given)
        oracle.assert_ratio(out[:num_rows, :n], plain, added, plain_float32_error=1e-2)
        results.append(out[:num_rows, :n].clone())
    for mine, more in zip(results, results[2:], strict=False):
        if len(mine) > 8 or len(more) <= 8:  # other cards have another cut for more
            assert torch.equal(mine, more[: len(mine)])


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(4096, 4096, 128), (320, 832, 64), (96, 288, 32)]
)
def test_norms_are_factors(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    """Before sums, before an activation, and behind an addition; for few rows, and for 16."""
    packed = make_packed(n, k, group_size)
    weight = w4a16.dequantised(packed, n, k).double()
    bias, norm_weight = torch.randn(2, n, device=CARD).to(dtype)
    op = torch.ops.pyserve.linear_w4a16
    for num_rows in (1, 5, 8, 9, 16):
        x = torch.randn(num_rows, k, device=CARD).to(dtype)
        x_squares = 20 * torch.rand(num_rows, ops.num_squares(k), device=CARD)
        factor = (x_squares.double().sum(1, keepdim=True) / k + 1e-5).rsqrt()
        sums = x.double() @ weight.T * factor + bias.double()
        for epilogue, exact in ((STORE, sums), (SILU_MUL, oracle.silu_mul(sums))):
            out = torch.full_like(exact, float("nan"), dtype=dtype)
            op(x, packed, bias, out, epilogue, x_squares, 1e-5)
            oracle.assert_ratio(out, exact.to(dtype), exact, plain_float32_error=1e-5)
        residual = torch.randn(num_rows, n, device=CARD).to(dtype)
        alone, added = residual.clone(), residual.clone()
        op(x, packed, bias, alone, ADD)
        exact = residual.double() + x.double() @ weight.T + bias.double()
        oracle.assert_ratio(alone, exact.to(dtype), exact, plain_float32_error=1e-5)
        scaled = torch.full((num_rows, n + 4), float("nan"), dtype=dtype, device=CARD)
        squares = torch.full((num_rows, ops.num_squares(n)), float("nan"), device=CARD)
        op(x, packed, bias, added, ADD, None, 0.0, norm_weight, scaled[:, :n], squares)
        assert torch.equal(added, alone) and bool(scaled[:, n:].isnan().all())
        assert torch.equal(scaled[:, :n], (added.float() * norm_weight.float()).to(dtype))
        wanted = added.double().square().view(num_rows, -1, 16).sum(2)
        torch.testing.assert_close(squares.double(), wanted, rtol=1e-5, atol=1e-6)


# Of a Llama of 8B; n and k no multiples of 256, of 128; half a unit of groups of 32.
MANY = [
    (6144, 4096, 128), (4096, 4096, 64), (28672, 4096, 128), (4096, 14336, 128), (4096, 14336, 32),
    (320, 448, 64), (1088, 1984, 32), (192, 832, 32), (832, 1152, 128), (128, 288, 32),
]  # fmt: skip


def run_epilogue(
    epilogue: int, x: Tensor, packed: Tensor, bias: Tensor | None, before: Tensor
) -> Tensor:
    """What becomes of `before`, in memory whose last row and columns may not be touched."""
    wide = torch.full((len(x) + 1, before.shape[1] + 8), float("nan"), dtype=x.dtype, device=CARD)
    out = wide[:-1, :-8]
    out.copy_(before)
    torch.ops.pyserve.linear_w4a16(x, packed, bias, out, epilogue)
    assert bool(wide[-1].isnan().all()) and bool(wide[:, -8:].isnan().all())
    return out


def check_epilogue(
    epilogue: int, x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """By the ratio rule, beside plain numbers of the same dtype and torch's float32 behind."""
    n = len(weight) // (2 if epilogue == SILU_MUL else 1)
    before = torch.randn(len(x), n, device=CARD).to(x.dtype)
    result = run_epilogue(epilogue, x, packed, bias, before)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, weight.to(x.dtype), bias).float()
    if epilogue == ADD:
        exact, plain = exact + before.double(), plain + before.float()
    elif epilogue == SILU_MUL:
        exact = torch.nn.functional.silu(exact[:, :n]) * exact[:, n:]
        plain = torch.nn.functional.silu(plain[:, :n]) * plain[:, n:]
    oracle.assert_ratio(result, plain.to(x.dtype), exact, plain_float32_error=1e-2)


@pytest.fixture
def tiling() -> Iterator[Callable[[int], None]]:
    """Chooses one of gemm_w4a16_sm90a.cu, by its number, 0 by estimate, until the test ends."""
    packed = make_packed(64, 256, 128)
    switch = torch.ops.pyserve.try_linear_w4a16
    yield lambda number: switch(packed, -1, number)
    switch(packed, -1)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), MANY)
def test_many_rows_by_the_integers(
    n: int, k: int, group_size: int, dtype: torch.dtype, tiling: Callable[[int], None]
) -> None:
    tiling(0)
    packed = make_packed(n, k, group_size, dtype)
    weight, bias = w4a16.dequantised(packed, n, k), torch.randn(n, device=CARD).to(dtype)
    wide = torch.randn(256, k + 8, device=CARD).to(dtype)
    wide[:, k:] = float("nan")
    for i, num_rows in enumerate((17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 256)):
        epilogue = (STORE, ADD, SILU_MUL)[(i + k // 32) % 3]
        given = bias if i % 2 else None
        check_epilogue(epilogue, wide[:num_rows, :k], packed, weight, given)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", [STORE, ADD, SILU_MUL])
@pytest.mark.parametrize(("n", "k", "group_size"), [(9600, 1152, 128), (832, 1088, 64)])
def test_every_tiling(
    n: int, k: int, group_size: int, epilogue: int, dtype: torch.dtype,
    tiling: Callable[[int], None],
) -> None:  # fmt: skip
    """Several tiles a cluster, each form of clusters; twice the same bits."""
    packed = make_packed(n, k, group_size, dtype)
    weight, bias = w4a16.dequantised(packed, n, k), torch.randn(n, device=CARD).to(dtype)
    x = torch.randn(300, k, device=CARD).to(dtype)
    before = torch.randn(300, n // (2 if epilogue == SILU_MUL else 1), device=CARD).to(dtype)
    for number in range(1, len(TILINGS) + 1):
        tiling(number)
        check_epilogue(epilogue, x, packed, weight, bias)
        first, second = (run_epilogue(epilogue, x, packed, bias, before) for _ in range(2))
        assert torch.equal(first, second), number


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="other cards' kernels do not round scales",
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group_size"), MANY[-4:])
def test_scales_of_more_bits_are_rounded_for_many_rows(
    n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    packed = make_packed(n, k, group_size)
    rounded = with_scales_of(packed, dtype)
    assert not torch.equal(packed, rounded)
    bias = torch.randn(n, device=CARD).to(dtype)
    for num_rows in (17, 64, 200):
        x, before = torch.randn(num_rows, k, device=CARD).to(dtype), bias.repeat(num_rows, 1)
        given, wanted = (run_epilogue(STORE, x, it, bias, before) for it in (packed, rounded))
        assert torch.equal(given, wanted)


def test_a_measurement_says_up_to_how_many_rows() -> None:
    packed = make_packed(64, 256, 128)
    x = torch.randn(20000, 256, device=CARD).bfloat16()
    serves, switch = torch.ops.pyserve.serves_linear_w4a16, torch.ops.pyserve.try_linear_w4a16
    assert serves(x[:1], packed) and serves(x[:16], packed) and not serves(x, packed)
    assert not serves(x[:17, :192], make_packed(64, 192, 64))  # too few columns but for few rows
    for most in (0, 300):
        switch(packed, most)
        try:
            assert [m for m in (1, 300, 301) if serves(x[:m], packed)] == [1, 300][: most // 150]
        finally:
            switch(packed, -1)
    assert serves(x[:16], packed) and not serves(x, packed)
    with pytest.raises(RuntimeError, match="try_linear_w4a16: max_rows is -2, at least -1"):
        switch(packed, -2)
    with pytest.raises(RuntimeError, match="try_linear_w4a16: tiling is 20, from -1 to 19"):
        switch(packed, -1, 20)


def test_rows_that_are_not_aligned_are_refused() -> None:
    packed, x = make_packed(64, 256, 128), torch.randn(3, 260, device=CARD).bfloat16()
    out = torch.empty(3, 64, device=CARD).bfloat16()
    with pytest.raises(RuntimeError, match="the rows of x must be aligned to 16 bytes"):
        torch.ops.pyserve.linear_w4a16(x[:, :256], packed, None, out)


@pytest.mark.parametrize("linear", [of_plain_numbers, own])
def test_a_product_is_recorded_and_replayed(linear: Callable[..., None]) -> None:
    packed = make_packed(4096, 1024, 128)
    x = torch.randn(3, 1024, device=CARD).bfloat16()
    out, scratch = torch.empty(3, 4096, device=CARD).bfloat16(), torch.empty(2**20, device=CARD)
    scratch = scratch.bfloat16()
    linear(x, packed, None, out, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear(x, packed, None, out, scratch)
    x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = out.clone()
    linear(x, packed, None, out, scratch)
    assert torch.equal(replayed, out)


@pytest.mark.parametrize("kind", ["awq-gemm", "awq-gemv", "gptq", "symmetric", "asymmetric"])
def test_what_is_loaded_there_is_what_is_loaded_here(kind: str, tmp_path: Path) -> None:
    quantised.save(tmp_path, quantised.formats(32)[kind], 32, head_dim=64)
    loaded = [
        load_model(
            tmp_path, ModelConfig.from_path(tmp_path), Placement(torch.float16, device),
            load_format="auto", seed=0, progress=lambda done, total: None,
        )
        for device in (torch.device("cpu"), CARD)
    ]  # fmt: skip
    for here, there in zip(*(decoder.layer_linears() for decoder in loaded), strict=True):
        assert torch.equal(here.matrix.packed, there.matrix.packed.cpu())
