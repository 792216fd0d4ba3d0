"""rope_write_kv on CUDA: ratio rule over head sizes, partial rotation, norms; cache, strides."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.ops.test_rope import MAX_POSITION, Case, check

DTYPES = (torch.bfloat16, torch.float16)
TENSORS = ("qkv", "positions", "cos_sin", "slot_mapping", "key_cache", "value_cache")


def make(
    *,
    dtype: torch.dtype = torch.bfloat16,
    norm: bool = False,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    num_tokens: int = 13,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> Case:
    case = Case.make(
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        dtype=dtype,
        norm=norm,
    )
    for name in (*TENSORS, "q_norm", "k_norm"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.cuda())
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 60, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_write_kv(dtype: torch.dtype, head_dim: int, norm: bool) -> None:
    check(make(head_dim=head_dim, dtype=dtype, norm=norm))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rotary_dim", [2, 20, 32, 48, 62])
def test_partial_rotation(head_dim: int, rotary_dim: int) -> None:
    check(make(head_dim=head_dim, rotary_dim=rotary_dim, norm=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [60, 64, 128, 256])
@pytest.mark.parametrize("norm", [False, True])
def test_norms_with_an_offset_and_queries_scaled_by_position(
    dtype: torch.dtype, head_dim: int, norm: bool
) -> None:
    case = make(head_dim=head_dim, rotary_dim=32, dtype=dtype, norm=norm)
    case.norm_offset, case.q_scales = 1.0, torch.rand(MAX_POSITION, device="cuda") + 0.5
    check(case)


def test_one_norm_only() -> None:
    case = make(norm=True)
    case.q_norm = None
    check(case)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads"),
    [(0, 4, 2), (1, 32, 8), (90, 7, 1), (64, 32, 8), (5, 1, 1), (33, 40, 40)],
)
def test_counts(num_tokens: int, num_heads: int, num_kv_heads: int) -> None:
    check(make(num_tokens=num_tokens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128))


@pytest.mark.parametrize("begin", [8, 9])  # aligned to 16 bytes, and not
def test_strided_qkv_and_caches(begin: int) -> None:
    case, other = make(), make()
    width = case.qkv.shape[1]
    wide = torch.zeros(len(case.qkv), width + 24, dtype=case.qkv.dtype, device="cuda")
    wide[:, begin : begin + width] = case.qkv
    case.qkv = wide[:, begin : begin + width]
    both = torch.full((6, 2, 16, 2, 64), 7.0, device="cuda").bfloat16()
    case.key_cache = both[:, 0]
    # Heads before tokens in memory.
    value_cache = torch.full((6, 2, 16, 64), 7.0, device="cuda").bfloat16()
    case.value_cache = value_cache.transpose(1, 2)
    case.run()
    other.run()

    def same(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-3)

    same(case.qkv, other.qkv)
    same(case.key_cache, other.key_cache)
    same(case.value_cache, other.value_cache)
    assert bool((wide[:, :begin] == 0).all() & (wide[:, begin + width :] == 0).all())
    assert bool((both[:, 1] == 7).all())


OUT_OF_RANGE = """
import os
import torch
from pyserve.ops import build
from tests.gpu.test_rope import make
build.load_native(is_reference_allowed=False, progress=print, device="cuda")
case = make()
case.{field}[-1] = {value}
try:
    case.run()
    torch.cuda.synchronize()
except RuntimeError:
    os._exit(7)
"""


def test_what_is_out_of_range_ends_the_process() -> None:
    """A kernel cannot raise; it must never read or write elsewhere instead."""
    ends = [("positions", 300), ("positions", -1), ("slot_mapping", 96), ("slot_mapping", -2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OUT_OF_RANGE.format(field=field, value=value)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for field, value in ends
    ]
    assert [process.wait() for process in processes] == [7] * len(ends)


def test_refusals() -> None:
    case = make()
    case.num_heads = 5
    with pytest.raises(RuntimeError, match="size 1 of qkv is 512, expected 576"):
        case.run()
    case = make()
    case.positions = case.positions.long()
    with pytest.raises(RuntimeError, match="positions must be Int, got Long"):
        case.run()
    case = make()
    case.cos_sin = torch.zeros(300, 66, device="cuda")
    with pytest.raises(RuntimeError, match="rotary_dim 66 must be even and at most head_dim 64"):
        case.run()
    case = make(norm=True)
    case.k_norm = torch.ones(63, device="cuda")
    with pytest.raises(RuntimeError, match="k_norm_weight is 63, expected 64"):
        case.run()
    with pytest.raises(RuntimeError, match="qkv must be bfloat16 or float16, got Float"):
        make(dtype=torch.float32).run()
