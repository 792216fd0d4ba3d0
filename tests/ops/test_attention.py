"""paged_attention: ratio rule for any mix of query lengths, heads, sizes and windows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle


@dataclass
class Case:
    """Sequences (query_len, seq_len), a padded row where seq_len is 0, in a poisoned cache."""

    q: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    row_slots: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    scale: float
    window: int
    keys: list[Tensor]
    values: list[Tensor]
    softcap: float = 0.0

    @classmethod
    def make(
        cls,
        rows: list[tuple[int, int]],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 16,
        window: int = 0,
        dtype: torch.dtype = torch.float32,
        spread: float = 1.0,
        softcap: float = 0.0,
    ) -> Case:
        torch.manual_seed(len(rows) + head_dim)
        num_tokens = sum(query_len for query_len, _ in rows)
        blocks_of = [-(-seq_len // block_size) for _, seq_len in rows]
        num_blocks = sum(blocks_of) + 3
        num_slots, width = len(rows) + 2, max(blocks_of, default=0) + 1
        # What no row may read is NaN, block ids that none may use are out of range.
        cache = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan)
        cache = cache.to(dtype)
        table = torch.full((num_slots, width), -1, dtype=torch.int32)
        free, slots = torch.randperm(num_blocks).tolist(), torch.randperm(num_slots).tolist()
        keys, values, row_slots, starts = [], [], [], [0]
        for (query_len, seq_len), num in zip(rows, blocks_of, strict=True):
            slot = slots.pop()
            kv = torch.randn(2, seq_len, num_kv_heads, head_dim).to(dtype)
            ids = torch.tensor([free.pop() for _ in range(num)], dtype=torch.int64)
            table[slot, :num] = ids
            for cached, part in zip(cache, kv, strict=True):
                for i, block in enumerate(ids.tolist()):
                    piece = part[i * block_size : (i + 1) * block_size]
                    cached[block, : len(piece)] = piece
            keys.append(kv[0])
            values.append(kv[1])
            row_slots.append(slot if seq_len else -1)
            starts.append(starts[-1] + query_len)
        return cls(
            q=(torch.randn(num_tokens, num_heads, head_dim) * spread).to(dtype),
            key_cache=cache[0],
            value_cache=cache[1],
            block_table=table,
            row_slots=torch.tensor(row_slots, dtype=torch.int32),
            cu_seqlens_q=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32),
            scale=head_dim**-0.5,
            window=window,
            keys=keys,
            values=values,
            softcap=softcap,
        )

    def run(self) -> Tensor:
        return ops.paged_attention(
            self.q,
            self.key_cache,
            self.value_cache,
            self.block_table,
            self.row_slots,
            self.cu_seqlens_q,
            self.seq_lens,
            softmax_scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )

    def twin(self) -> Tensor:
        out = torch.full_like(self.q, torch.nan)
        reference.paged_attention(
            self.q,
            self.key_cache,
            self.value_cache,
            self.block_table,
            self.row_slots,
            self.cu_seqlens_q,
            self.seq_lens,
            self.scale,
            self.window,
            len(self.q),
            None,
            None,
            out,
            self.softcap,
        )
        return out

    def exact(self) -> Tensor:
        out = torch.full(self.q.shape, torch.nan, dtype=torch.float64)
        starts = self.cu_seqlens_q.tolist()
        for row, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            begin, end = starts[row], starts[row + 1]
            if len(k):
                out[begin:end] = oracle.attention(
                    self.q[begin:end], k, v, self.scale, self.window, self.softcap
                )
        return out

    def float32_error(self) -> float:
        """What float32 may lose, relative: a score of size s stands in an exponent, off by s
        roundings."""
        norms = [keys.float().norm(dim=-1).max() for keys in self.keys if len(keys)]
        largest_q = self.q.float().norm(dim=-1).max() if len(self.q) else 0.0
        largest_score = float(max(norms, default=0.0) * largest_q) * self.scale
        return 1e-6 + largest_score * 2.0**-24


def check(case: Case) -> None:
    oracle.assert_ratio(
        case.run(), case.twin(), case.exact(), plain_float32_error=case.float32_error()
    )


MIX = [(1, 1), (1, 17), (5, 5), (1, 64), (3, 70), (1, 200), (40, 40), (70, 133), (1, 65)]


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64, 80, 96, 128, 256])
def test_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    check(Case.make(MIX, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(
    "heads", [(1, 1), (4, 4), (6, 2), (7, 1), (8, 1), (10, 2), (12, 2), (28, 4), (64, 1)]
)
def test_groups(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    num_heads, num_kv_heads = heads
    for head_dim in (64, 96, 128, 256):
        check(
            Case.make(
                [(1, 90), (9, 33), (1, 128), (1, 2)],
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=dtype,
            )
        )


@pytest.mark.parametrize("window", [1, 2, 15, 16, 64, 65, 100, 1000])
def test_windows(window: int) -> None:
    for head_dim in (32, 64):
        check(Case.make(MIX, window=window, head_dim=head_dim))


def test_blocks_before_the_window_are_not_touched() -> None:
    case = Case.make([(1, 200), (20, 200)], window=30)
    case.block_table[case.row_slots[0].long(), : 170 // 16] = -1
    case.block_table[case.row_slots[1].long(), : 151 // 16] = 10**6
    check_against = case.exact()
    torch.testing.assert_close(case.run().double(), check_against, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_capped_scores(dtype: torch.dtype, head_dim: int) -> None:
    """Scores below, around and far beyond the cap, in decode rows and others."""
    for softcap, spread in ((50.0, 1.0), (3.0, 4.0), (1.5, 400.0)):
        for window in (0, 30):
            check(
                Case.make(
                    MIX, head_dim=head_dim, dtype=dtype, softcap=softcap, spread=spread,
                    window=window,
                )
            )  # fmt: skip


@pytest.mark.parametrize("block_size", [1, 4, 7, 16, 256])
def test_block_sizes(block_size: int) -> None:
    check(Case.make(MIX, block_size=block_size))


def test_padded_rows_write_nothing() -> None:
    case = Case.make([(1, 20), (2, 0), (1, 30), (0, 0)])
    out = torch.full_like(case.q, 5.0)
    torch.ops.pyserve.paged_attention(
        case.q,
        case.key_cache,
        case.value_cache,
        case.block_table,
        case.row_slots,
        case.cu_seqlens_q,
        case.seq_lens,
        case.scale,
        0,
        len(case.q),
        None,
        None,
        out,
    )
    assert (out[1:3] == 5).all()
    torch.testing.assert_close(out[[0, 3]].double(), case.exact()[[0, 3]], rtol=1e-5, atol=1e-5)


def test_peaked_scores() -> None:
    """Scores in the hundreds: online softmax must neither overflow nor lose the maximum."""
    check(Case.make(MIX, spread=80.0))
    check(Case.make([(1, 300), (64, 300)], spread=400.0, head_dim=128))


def test_strided_views() -> None:
    case = Case.make(MIX, num_heads=4, num_kv_heads=2)
    expected = case.run()
    qkv = torch.randn(len(case.q), (4 + 2 + 2) * 64)
    qkv[:, : 4 * 64] = case.q.flatten(1)
    case.q = qkv.view(len(case.q), 8, 64)[:, :4]
    both = torch.stack((case.key_cache, case.value_cache), 1)
    case.key_cache, case.value_cache = both[:, 0], both[:, 1]
    assert torch.equal(case.run(), expected)


def test_a_row_does_not_depend_on_its_batch() -> None:
    for dtype in oracle.DTYPES:
        case = Case.make(MIX, dtype=dtype)
        together = case.run()
        starts = case.cu_seqlens_q.tolist()
        for row in range(len(MIX)):
            alone = ops.paged_attention(
                case.q[starts[row] : starts[row + 1]],
                case.key_cache,
                case.value_cache,
                case.block_table,
                case.row_slots[row : row + 1],
                torch.tensor([0, MIX[row][0]], dtype=torch.int32),
                case.seq_lens[row : row + 1],
                softmax_scale=case.scale,
            )
            assert torch.equal(alone, together[starts[row] : starts[row + 1]])


def test_threads_change_nothing() -> None:
    case = Case.make([(200, 700), (1, 900), (1, 50), (64, 64)], num_heads=8, num_kv_heads=4)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(case.run())
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nan_in_one_sequence_stays_there() -> None:
    case = Case.make([(1, 40), (8, 40), (1, 40)])
    for row, bad in ((0, case.key_cache), (1, case.value_cache)):
        block = case.block_table[case.row_slots[row].long(), 1]
        bad[block, 3] = torch.nan
    out = case.run()
    assert out[0].isnan().all() and out[1:9].isnan().all() and out[9].isfinite().all()


def test_random_mixes() -> None:
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(25):
        rows = []
        for _ in range(pick(1, 7)):
            query_len = pick(1, 90) if pick(0, 2) else 1
            rows.append((query_len, query_len + pick(0, 150)))
        num_kv_heads = pick(1, 4)
        check(
            Case.make(
                rows,
                num_heads=num_kv_heads * pick(1, 6),
                num_kv_heads=num_kv_heads,
                head_dim=8 * pick(1, 20),
                block_size=2 ** pick(0, 6),
                window=pick(1, 100) if pick(0, 2) else 0,
                dtype=oracle.DTYPES[pick(0, 2)],
            )
        )


def test_hostile_metadata() -> None:
    def case() -> Case:
        return Case.make([(2, 20), (1, 30)])

    for field, index, value, message in (
        ("row_slots", 1, 9, "row 1 has slot 9 of 4"),
        ("row_slots", 1, 4, "row 1 has slot 4 of 4"),
        ("row_slots", 1, -2, "row 1 has slot -2"),
        ("cu_seqlens_q", 2, 4, r"row 1 has queries \[2, 4\) of 3"),
        ("cu_seqlens_q", 1, -1, r"row 0 has queries \[0, -1\)"),
        ("seq_lens", 0, 1, "row 0 has 2 queries and sequence length 1"),
        ("seq_lens", 1, 49, "row 1 has 1 queries and sequence length 49"),
        ("seq_lens", 1, 2**31 - 1, "row 1 has 1 queries"),
    ):
        bad = case()
        getattr(bad, field)[index] = value
        with pytest.raises(RuntimeError, match=message):
            bad.run()
    for block_id in (-1, len(case().key_cache), 100, -(2**31), 2**31 - 1):
        bad = case()
        bad.block_table[bad.row_slots[1].long(), 1] = block_id
        with pytest.raises(RuntimeError, match=f"row 1 has block id {block_id} of"):
            bad.run()
    with pytest.raises(RuntimeError, match="head_dim 12 is not a multiple of 8"):
        Case.make([(1, 3)], head_dim=12).run()
    with pytest.raises(RuntimeError, match="5 heads are not a multiple of 2 KV heads"):
        Case.make([(1, 3)], num_heads=5).run()
    with pytest.raises(RuntimeError, match="softcap -1.0+ must be 0 or more"):
        Case.make([(1, 3)], softcap=-1.0).run()
    bad = case()
    bad.value_cache = bad.value_cache.bfloat16()
    with pytest.raises(RuntimeError, match="value_cache is BFloat16, q is Float"):
        bad.run()
