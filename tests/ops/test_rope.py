"""rope_write_kv: ratio rule over head sizes, partial rotation, norms; the cache; refusals."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle

EPS = 1e-6
MAX_POSITION = 300


@dataclass
class Case:
    qkv: Tensor
    positions: Tensor
    cos_sin: Tensor
    slot_mapping: Tensor
    key_cache: Tensor
    value_cache: Tensor
    num_heads: int
    num_kv_heads: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    norm_offset: float = 0.0
    q_scales: Tensor | None = None

    @classmethod
    def make(
        cls,
        *,
        num_tokens: int = 13,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        rotary_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        norm: bool = False,
    ) -> Case:
        torch.manual_seed(head_dim + num_tokens)
        num_blocks, block_size = 6, 16
        angles = torch.outer(
            torch.arange(MAX_POSITION).float(), torch.rand((rotary_dim or head_dim) // 2)
        )
        slots = torch.randperm(num_blocks * block_size)[:num_tokens]
        slots[1::5] = -1
        cache = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), 7.0).to(dtype)
        return cls(
            qkv=torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype),
            positions=torch.randint(0, MAX_POSITION, (num_tokens,), dtype=torch.int32),
            cos_sin=torch.cat((angles.cos(), angles.sin()), 1),
            slot_mapping=slots,
            key_cache=cache[0],
            value_cache=cache[1],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            q_norm=torch.rand(head_dim).to(dtype) + 0.5 if norm else None,
            k_norm=torch.rand(head_dim).to(dtype) + 0.5 if norm else None,
        )

    def run(self) -> None:
        ops.rope_write_kv(
            self.qkv,
            self.positions,
            self.cos_sin,
            self.slot_mapping,
            self.key_cache,
            self.value_cache,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            q_norm_weight=self.q_norm,
            k_norm_weight=self.k_norm,
            eps=EPS,
            norm_offset=self.norm_offset,
            q_scales=self.q_scales,
        )

    def twin(self) -> Case:
        """A copy on which the reference has run."""
        copy = Case(
            self.qkv.clone(),
            self.positions,
            self.cos_sin,
            self.slot_mapping,
            self.key_cache.clone(),
            self.value_cache.clone(),
            self.num_heads,
            self.num_kv_heads,
            self.q_norm,
            self.k_norm,
            self.norm_offset,
            self.q_scales,
        )
        reference.rope_write_kv(
            copy.qkv,
            copy.positions,
            copy.cos_sin,
            copy.slot_mapping,
            copy.q_norm,
            copy.k_norm,
            EPS,
            copy.num_heads,
            copy.num_kv_heads,
            copy.key_cache,
            copy.value_cache,
            copy.norm_offset,
            copy.q_scales,
        )
        return copy

    def heads(self) -> list[Tensor]:
        """q, k, v as [num_tokens, heads, head_dim]."""
        num_heads = self.num_heads + 2 * self.num_kv_heads
        per_head = self.qkv.view(len(self.qkv), num_heads, self.key_cache.shape[3])
        return list(per_head.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], 1))


def check(case: Case) -> None:
    q, k, v = (part.clone() for part in case.heads())
    exact_q, exact_k = q.double(), k.double()
    if case.q_norm is not None:
        exact_q = oracle.rms_norm(q, case.q_norm, EPS, case.norm_offset)
    if case.k_norm is not None:
        exact_k = oracle.rms_norm(k, case.k_norm, EPS, case.norm_offset)
    exact_q = oracle.rotate(exact_q, case.positions, case.cos_sin)
    if case.q_scales is not None:
        exact_q = exact_q * case.q_scales[case.positions.long(), None, None].double()
    exact_k = oracle.rotate(exact_k, case.positions, case.cos_sin)
    twin = case.twin()
    case.run()
    oracle.assert_ratio(case.heads()[0], twin.heads()[0], exact_q)
    assert torch.equal(case.heads()[1], k) and torch.equal(case.heads()[2], v)
    written = case.slot_mapping >= 0
    slots = case.slot_mapping[written]
    keys, values = case.key_cache.flatten(0, 1), case.value_cache.flatten(0, 1)
    oracle.assert_ratio(keys[slots], twin.key_cache.flatten(0, 1)[slots], exact_k[written])
    assert torch.equal(values[slots], v[written])
    untouched = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    untouched[slots] = False
    assert bool((keys[untouched] == 7).all()) and bool((values[untouched] == 7).all())


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_write_kv(dtype: torch.dtype, head_dim: int, norm: bool) -> None:
    check(Case.make(head_dim=head_dim, dtype=dtype, norm=norm))


@pytest.mark.parametrize("rotary_dim", [2, 20, 32, 62])
def test_partial_rotation(rotary_dim: int) -> None:
    check(Case.make(rotary_dim=rotary_dim, norm=True))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("head_dim", [24, 256])
def test_norms_with_an_offset_and_queries_scaled_by_position(
    dtype: torch.dtype, head_dim: int
) -> None:
    case = Case.make(head_dim=head_dim, rotary_dim=16, dtype=dtype, norm=True)
    case.norm_offset, case.q_scales = 1.0, torch.rand(MAX_POSITION) + 0.5
    check(case)
    case.q_scales = torch.rand(MAX_POSITION - 1)
    with pytest.raises(RuntimeError, match="q_scales is 299, expected 300"):
        case.run()


@pytest.mark.parametrize("num_tokens", [0, 1, 90])
def test_token_counts(num_tokens: int) -> None:
    check(Case.make(num_tokens=num_tokens, num_heads=7, num_kv_heads=1))


def test_strided_cache_and_qkv() -> None:
    case, other = Case.make(), Case.make()
    wide = torch.zeros(len(case.qkv), case.qkv.shape[1] + 24)
    wide[:, 8:-16] = case.qkv
    case.qkv = wide[:, 8:-16]
    both = torch.full((6, 2, 16, 2, 64), 7.0)
    case.key_cache, case.value_cache = both[:, 0], both[:, 1]
    case.run()
    other.run()
    assert torch.equal(case.qkv, other.qkv)
    assert torch.equal(case.key_cache, other.key_cache)
    assert torch.equal(case.value_cache, other.value_cache)


def test_nothing_is_written_where_a_range_is_wrong() -> None:
    for field, value, message in (
        ("positions", MAX_POSITION, r"position 300 is outside \[0, 300\)"),
        ("positions", -1, "position -1"),
        ("slot_mapping", 96, r"KV slot 96 is outside \[-1, 96\)"),
        ("slot_mapping", -2, "KV slot -2"),
    ):
        case = Case.make()
        getattr(case, field)[-1] = value
        before = case.qkv.clone()
        with pytest.raises(RuntimeError, match=message):
            case.run()
        assert torch.equal(case.qkv, before) and (case.key_cache == 7).all()


def test_refusals() -> None:
    case = Case.make()
    case.num_heads = 5
    with pytest.raises(RuntimeError, match="size 1 of qkv is 512, expected 576"):
        case.run()
    case = Case.make()
    case.positions = case.positions.long()
    with pytest.raises(RuntimeError, match="positions must be Int, got Long"):
        case.run()
    case = Case.make()
    case.cos_sin = torch.zeros(MAX_POSITION, 66)
    with pytest.raises(RuntimeError, match="rotary_dim 66 must be even and at most head_dim 64"):
        case.run()
    case = Case.make(norm=True)
    case.k_norm = torch.ones(63)
    with pytest.raises(RuntimeError, match="k_norm_weight is 63, expected 64"):
        case.run()


def test_the_twin_of_rope_attention_is_rope_write_kv_and_paged_attention() -> None:
    case = Case.make(num_tokens=3, num_heads=4, num_kv_heads=2, head_dim=64)
    lens, starts = torch.tensor([5, 18]).int(), torch.tensor([0, 2, 3]).int()
    table, row_slots = torch.tensor([[3, 0], [2, 5]]).int(), torch.tensor([1, 0]).int()
    case.positions = torch.tensor([3, 4, 17]).int()
    case.slot_mapping = torch.tensor([2 * 16 + 3, 2 * 16 + 4, 0 * 16 + 1])
    q, qkv = case.heads()[0], case.qkv.clone()
    rows, none = (table, row_slots, starts, lens), torch.empty(0)
    caches = case.key_cache.clone(), case.value_cache.clone()
    twin = torch.empty(q.shape)
    reference.rope_attention(q, case.qkv, case.cos_sin, *caches, *rows, 0.125, 16, none, none, twin)
    assert torch.equal(case.qkv, qkv)
    case.run()
    torch.testing.assert_close(caches, (case.key_cache, case.value_cache))
    out = ops.paged_attention(
        q, case.key_cache, case.value_cache, *rows, softmax_scale=0.125, window=16
    )
    torch.testing.assert_close(twin, out)
