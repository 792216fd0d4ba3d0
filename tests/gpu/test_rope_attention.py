"""rope_attention on a card against rope_write_kv and paged_attention, bit for bit, and its twin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import attention_plan, reference

CARD = torch.device("cuda")
BLOCK_SIZE = 16
MAX_POSITION = 4096
EDGES = [1, 15, 16, 17, 63, 64, 65, 66, 67, 128, 129, 3000]


@dataclass(frozen=True)
class Case:
    """Rows of a decode step, their caches as earlier steps have left them."""

    qkv: Tensor
    cos_sin: Tensor
    caches: tuple[Tensor, Tensor]
    block_table: Tensor
    row_slots: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    num_heads: int
    plan: ops.AttentionPlan
    window: int
    softcap: float

    @classmethod
    def make(
        cls, rows: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype,
        window: int = 0, softcap: float = 0.0,
    ) -> Case:  # fmt: skip
        """Rows of (query_len, seq_len); the last one is padding."""
        num_heads, num_kv_heads, head_dim = heads
        torch.manual_seed(len(rows) + head_dim)
        query_lens, lens = [row[0] for row in rows], [row[1] for row in rows]
        num_tokens, num_blocks = sum(query_lens), [-(-n // BLOCK_SIZE) for n in lens]
        table = torch.zeros(len(rows), max(num_blocks), dtype=torch.int32)
        for row, ids in enumerate(torch.randperm(sum(num_blocks)).int().split(num_blocks)):
            table[row, : len(ids)] = ids
        angles = torch.outer(torch.arange(MAX_POSITION).float(), torch.rand(head_dim // 2))
        shape = (sum(num_blocks), BLOCK_SIZE, num_kv_heads, head_dim)
        width = (num_heads + 2 * num_kv_heads) * head_dim
        starts = torch.tensor([0, *accumulate(query_lens), num_tokens]).int()
        plan = attention_plan.allocate(
            num_tokens, len(rows) + 1, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, device=CARD,
        )  # fmt: skip
        case = cls(
            qkv=torch.randn(num_tokens, width, dtype=dtype).to(CARD),
            cos_sin=torch.cat((angles.cos(), angles.sin()), 1).to(CARD),
            caches=(torch.randn(shape, dtype=dtype).to(CARD),) * 2,
            block_table=table.to(CARD),
            row_slots=torch.tensor([*range(len(rows)), -1]).int().to(CARD),
            cu_seqlens_q=starts.to(CARD),
            seq_lens=torch.tensor([*lens, 0]).int().to(CARD),
            num_heads=num_heads,
            plan=plan,
            window=window,
            softcap=softcap,
        )
        ops.plan_attention(
            case.cu_seqlens_q, case.seq_lens, plan, num_heads=num_heads,
            num_kv_heads=num_kv_heads, window=window,
        )  # fmt: skip
        torch.cuda.synchronize()
        return case

    def fresh(self) -> Case:
        """With tensors of its own where ops write."""
        keys, values = self.caches
        return replace(self, qkv=self.qkv.clone(), caches=(keys.clone(), values.clone()))

    @property
    def q(self) -> Tensor:
        head_dim = self.caches[0].shape[3]
        return self.qkv[:, : self.num_heads * head_dim].view(-1, self.num_heads, head_dim)

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.block_table, self.row_slots, self.cu_seqlens_q, self.seq_lens

    def fused(self) -> list[Tensor]:
        """What rope_attention leaves: out, keys, values."""
        torch.cuda.synchronize()  # it reads plan and caches early, as behind a linear
        out = ops.rope_attention(
            self.q, self.qkv, self.cos_sin, *self.caches, *self.rows, softmax_scale=0.1,
            window=self.window, plan=self.plan, softcap=self.softcap,
        )  # fmt: skip
        return [out, *self.caches]

    def separate(self) -> list[Tensor]:
        lens, table = self.seq_lens.tolist(), self.block_table.tolist()
        starts, positions, slots = self.cu_seqlens_q.tolist(), [], []
        for row in range(len(table)):
            for position in range(lens[row] - (starts[row + 1] - starts[row]), lens[row]):
                block, offset = divmod(position, BLOCK_SIZE)
                positions.append(position)
                slots.append(table[row][block] * BLOCK_SIZE + offset)
        ops.rope_write_kv(
            self.qkv, torch.tensor(positions).int().to(CARD), self.cos_sin,
            torch.tensor(slots).to(CARD), *self.caches, num_heads=self.num_heads,
            num_kv_heads=self.caches[0].shape[2],
        )  # fmt: skip
        out = ops.paged_attention(
            self.q, *self.caches, *self.rows, softmax_scale=0.1, window=self.window,
            max_query_len=16, plan=self.plan, softcap=self.softcap,
        )  # fmt: skip
        return [out, *self.caches]


def assert_same(case: Case) -> None:
    one, other = case.fresh(), case.fresh()
    for mine, theirs in zip(one.fused(), other.separate(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(one.qkv, case.qkv, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "softcap"),
    [
        ((32, 8, 128), 0.0), ((32, 8, 64), 0.0), ((8, 8, 128), 0.0), ((16, 1, 64), 0.0),
        ((32, 32, 96), 0.0), ((16, 8, 256), 50.0), ((8, 4, 256), 0.0), ((32, 16, 128), 50.0),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("window", [0, 100])
def test_equals_rope_write_kv_and_paged_attention(
    dtype: torch.dtype, heads: tuple[int, int, int], softcap: float, window: int
) -> None:
    most = attention_plan.decode_query_len(*heads[:2])
    assert_same(Case.make([(1, n) for n in EDGES], heads, dtype, window, softcap))
    several = [(1 + i % min(most, n), n) for i, n in enumerate(EDGES)]
    assert_same(Case.make(several, heads, dtype, window, softcap))


def test_one_long_row_and_many_short_ones() -> None:
    heads = (32, 8, 128)
    assert_same(Case.make([(1, 4096)], heads, torch.bfloat16))
    assert_same(Case.make([(1, 1 + i % 90) for i in range(256)], heads, torch.bfloat16))


@pytest.mark.sanitize
@pytest.mark.parametrize(("head_dim", "softcap"), [(64, 0.0), (96, 1.0), (128, 0.0), (256, 1.0)])
def test_is_its_twin(head_dim: int, softcap: float) -> None:
    rows, heads = [(1, 1), (2, 66), (1, 200)], (4, 2, head_dim)
    case = Case.make(rows, heads, torch.bfloat16, 50, softcap)
    one, other = case.fresh(), case.fresh()
    out = torch.empty_like(other.q, memory_format=torch.contiguous_format)
    reference.rope_attention(
        other.q, other.qkv, case.cos_sin, *other.caches, *case.rows, 0.1, 50, case.plan.work,
        case.plan.workspace, out, softcap,
    )  # fmt: skip
    for mine, twin in zip(one.fused(), [out, *other.caches], strict=True):
        error = (mine.double() - twin.double()).norm() / twin.double().norm()
        assert error <= 1e-2  # false for NaN


def test_what_does_not_fit_is_refused() -> None:
    case = Case.make([(1, 20)], (4, 2, 64), torch.bfloat16)
    short = replace(case, cos_sin=case.cos_sin[:, :32])
    with pytest.raises(RuntimeError, match="rope_attention: size 1 of cos_sin is 32, expected 64"):
        short.fused()
    with pytest.raises(RuntimeError, match="17 heads a KV head, at most 16"):
        Case.make([(1, 20)], (17, 1, 64), torch.bfloat16).fused()
