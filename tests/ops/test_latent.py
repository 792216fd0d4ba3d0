"""The ops of latent attention: ratio rule for any mix of query lengths, heads and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyserve.ops import latent, reference_latent
from tests.ops import oracle
from tests.ops.test_attention import MIX, Case

ROPE_DIM = 8
SIZES = [(16, 8), (24, 8), (72, 16), (256, 32), (512, 64)]  # of the latent, of what is rotated


def case_of(rows: list[tuple[int, int]], rank: int, rope_dim: int, **changes: Any) -> Case:
    """One KV head, whose values are not looked at."""
    return Case.make(rows, num_kv_heads=1, head_dim=rank + rope_dim, **changes)


def attend(case: Case, rank: int, op: Any = None) -> Tensor:
    # Strided, as in a step.
    room = case.q.new_full((len(case.q), case.q.shape[1], rank + 8), torch.nan)
    out = room[..., :rank]
    op = op or torch.ops.pyserve.latent_attention
    op(
        case.q, case.key_cache.squeeze(2), case.block_table, case.row_slots, case.cu_seqlens_q,
        case.seq_lens, case.scale, len(case.q), None, None, out,
    )  # fmt: skip
    assert bool(room[..., rank:].isnan().all())
    return out


def check(case: Case, rank: int) -> None:
    exact = torch.full((*case.q.shape[:2], rank), torch.nan, dtype=torch.float64)
    starts = case.cu_seqlens_q.tolist()
    for row, keys in enumerate(case.keys):
        begin, end = starts[row], starts[row + 1]
        if len(keys):
            exact[begin:end] = oracle.attention(
                case.q[begin:end], keys, keys[..., :rank], case.scale, 0
            )
    oracle.assert_ratio(
        attend(case, rank), attend(case, rank, reference_latent.latent_attention), exact,
        plain_float32_error=case.float32_error(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("rank", "rope_dim"), SIZES)
def test_sizes(dtype: torch.dtype, rank: int, rope_dim: int) -> None:
    check(case_of([*MIX, (0, 0)], rank, rope_dim, dtype=dtype), rank)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("num_heads", [1, 3, 16, 20, 64, 65, 128])
def test_heads(dtype: torch.dtype, num_heads: int) -> None:
    rows = [(1, 90), (9, 33), (1, 128), (1, 2)]
    check(case_of(rows, 64, ROPE_DIM, num_heads=num_heads, dtype=dtype), 64)


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_sizes(block_size: int) -> None:
    check(case_of(MIX, 40, ROPE_DIM, block_size=block_size), 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_lens": torch.tensor([60, 5], dtype=torch.int32)}, "row 0 has 1 queries and"),
        ({"row_slots": torch.tensor([4, 0], dtype=torch.int32)}, "row 0 has slot 4 of 4"),
        ({"key_cache": torch.zeros(2, 16, 1, 24)}, "row . has block id . of 2"),
        ({"key_cache": torch.zeros(9, 16, 1, 32)}, "size 2 of latent_cache is 32, expected 24"),
        ({"scale": 0.0}, "softmax_scale 0.0* must be positive"),
    ],
)
def test_what_leads_out_of_bounds_is_an_error(changes: dict[str, Any], message: str) -> None:
    case = case_of([(1, 20), (2, 5)], 16, 8)
    case.block_table.clamp_(max=5)
    for name, value in changes.items():
        setattr(case, name, value)
    with pytest.raises(RuntimeError, match=message):
        attend(case, 16)


def rope_case(rank: int, rope_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(rank)
    heads = torch.randn(6, 3, rope_dim + 5).to(dtype)
    return {
        "q": heads[..., 5:],
        "compressed": torch.randn(6, rank + rope_dim).to(dtype),
        "positions": torch.tensor([0, 3, 8, 1, 5, 2], dtype=torch.int32),
        "cos_sin": torch.randn(9, rope_dim),
        "slot_mapping": torch.tensor([5, -1, 0, 17, 31, 16]),
        "norm_weight": torch.randn(rank).to(dtype),
        "eps": 1e-3,
        "latent_cache": torch.full((2, 16, rank + rope_dim), torch.nan, dtype=dtype),
        "rotated": torch.full((6, 3, rank + rope_dim), torch.nan, dtype=dtype)[..., rank:],
    }


@pytest.mark.parametrize("has_pairs", [True, False])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("rank", "rope_dim"), SIZES)
def test_what_is_kept(rank: int, rope_dim: int, dtype: torch.dtype, has_pairs: bool) -> None:
    mine, twin = rope_case(rank, rope_dim, dtype), rope_case(rank, rope_dim, dtype)
    latent.rope_write_latent(**mine, has_pairs=has_pairs)
    reference_latent.rope_write_latent(**twin, has_pairs=has_pairs)

    def turned(x: Tensor) -> Tensor:
        if has_pairs:
            x = torch.cat((x[..., ::2], x[..., 1::2]), -1)
        x = x.view(len(x), -1, rope_dim)
        return oracle.rotate(x, mine["positions"], mine["cos_sin"])

    oracle.assert_ratio(mine["rotated"], twin["rotated"], turned(mine["q"]))
    compressed = mine["compressed"]
    kept = torch.cat(
        (
            oracle.rms_norm(compressed[:, :rank], mine["norm_weight"], mine["eps"]),
            turned(compressed[:, rank:]).squeeze(1),
        ),
        -1,
    )
    exact = torch.full((32, rank + rope_dim), torch.nan, dtype=torch.float64)
    written = mine["slot_mapping"] >= 0
    exact[mine["slot_mapping"][written]] = kept[written]
    caches = [case["latent_cache"].flatten(0, 1) for case in (mine, twin)]
    oracle.assert_ratio(caches[0], caches[1], exact)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positions", 9, r"position (9 )?is outside \[0, 9\)"),
        ("slot_mapping", 32, r"KV slot (32 )?is outside \[-1, 32\)"),
    ],
)
def test_rope_out_of_range_is_an_error(name: str, value: int, message: str) -> None:
    case = rope_case(16, 8, torch.float32)
    case[name][4] = value
    for op in (latent.rope_write_latent, reference_latent.rope_write_latent):
        with pytest.raises(RuntimeError, match=message):
            op(**case, has_pairs=True)
    assert bool(case["latent_cache"].isnan().all()), "nothing is written before the checks"


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(("batch", "n", "k"), [(1, 5, 24), (3, 48, 40), (4, 128, 512)])
def test_batched_linear(dtype: torch.dtype, batch: int, n: int, k: int) -> None:
    for m in (1, 3, 16, 70):
        torch.manual_seed(m)
        x = torch.randn(m, batch, k + 8).to(dtype)[..., 8:]
        weight = torch.randn(batch, n, k).to(dtype)
        mine, twin = (torch.full((m, batch, n + 8), torch.nan).to(dtype) for _ in range(2))
        latent.batched_linear(x, weight, mine[..., :n])
        reference_latent.batched_linear(x, weight, twin[..., :n])
        exact = torch.einsum("mbk,bnk->mbn", x.double(), weight.double())
        float32_error = 1e-6 + k**0.5 * 2.0**-24
        oracle.assert_ratio(mine[..., :n], twin[..., :n], exact, plain_float32_error=float32_error)
        assert bool(mine[..., n:].isnan().all())
