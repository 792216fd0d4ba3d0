"""plan_attention and paged_attention on a card: decode and prefill against float64; plans."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.limits import CUDA_CAPPED_HEAD_DIMS, CUDA_HEAD_DIMS
from pyserve.ops import attention_plan, reference
from tests.ops import attention_plan_check as plans
from tests.ops import oracle
from tests.ops.test_attention import MIX, Case

DTYPES = (torch.bfloat16, torch.float16)
KINDS = [(head_dim, 0.0) for head_dim in CUDA_HEAD_DIMS]  # head_dim and softcap
KINDS += [(head_dim, 3.0) for head_dim in CUDA_CAPPED_HEAD_DIMS]
CARD = torch.device("cuda")
TENSORS = (
    "q", "key_cache", "value_cache", "block_table", "row_slots", "cu_seqlens_q", "seq_lens",
)  # fmt: skip


def to_card(case: Case) -> Case:
    """The same case with what the ops read on the card; `keys` and `values` stay."""
    moved = {name: getattr(case, name).to(CARD) for name in TENSORS}
    rest = {name: getattr(case, name) for name in ("scale", "window", "keys", "values", "softcap")}
    return Case(**moved, **rest)


def allocate(case: Case) -> ops.AttentionPlan:
    return attention_plan.allocate(
        len(case.q), len(case.seq_lens), num_heads=case.q.shape[1],
        num_kv_heads=case.key_cache.shape[2], head_dim=case.q.shape[2], device=CARD,
    )  # fmt: skip


def fill(case: Case, plan: ops.AttentionPlan) -> ops.AttentionPlan:
    ops.plan_attention(
        case.cu_seqlens_q, case.seq_lens, plan, num_heads=case.q.shape[1],
        num_kv_heads=case.key_cache.shape[2], window=case.window,
    )  # fmt: skip
    return plan


def attend(case: Case, plan: ops.AttentionPlan, max_query_len: int | None = None) -> Tensor:
    """The op of a case on the card, into an output full of NaN."""
    out = torch.full_like(case.q, torch.nan, memory_format=torch.contiguous_format)
    torch.ops.pyserve.paged_attention(
        *(getattr(case, name) for name in TENSORS),
        case.scale,
        case.window,
        len(case.q) if max_query_len is None else max_query_len,
        plan.work,
        plan.workspace,
        out,
        case.softcap,
    )
    return out


def run(case: Case) -> Tensor:
    card = to_card(case)
    return attend(card, fill(card, allocate(card))).cpu()


def check(case: Case) -> None:
    oracle.assert_ratio(
        run(case), case.twin(), case.exact(), plain_float32_error=case.float32_error()
    )


def sdpa(case: Case, row: int, keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention of one row on the card in `dtype`; keys, values [seq_len, num_kv_heads, dim]."""
    begin, end = case.cu_seqlens_q[row : row + 2].tolist()
    position = torch.arange(len(keys) - (end - begin), len(keys), device=CARD)[:, None]
    distance = position - torch.arange(len(keys), device=CARD)
    hidden = distance < 0
    if case.window:
        hidden |= distance >= case.window
    group = case.q.shape[1] // keys.shape[1]
    result = torch.empty(end - begin, *case.q.shape[1:], dtype=dtype, device=CARD)
    for head in range(case.q.shape[1]):
        q, k = case.q[begin:end, head].to(dtype), keys[:, head // group].to(dtype)
        scores = q @ k.T * case.scale
        if case.softcap:
            scores = case.softcap * (scores / case.softcap).tanh()
        scores.masked_fill_(hidden, -torch.inf)
        result[:, head] = scores.softmax(-1) @ values[:, head // group].to(dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "softcap"), KINDS)
def test_mixed_rows(dtype: torch.dtype, head_dim: int, softcap: float) -> None:
    check(Case.make(MIX, head_dim=head_dim, dtype=dtype, softcap=softcap))


EDGES = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "softcap"), KINDS)
@pytest.mark.parametrize("window", [0, 40])
def test_edges_of_tiles(dtype: torch.dtype, head_dim: int, softcap: float, window: int) -> None:
    """Of decode, of whole prompts and of what comes behind a prefix."""
    make = partial(Case.make, head_dim=head_dim, dtype=dtype, softcap=softcap, window=window)
    check(make([(1, n) for n in EDGES]))
    check(make([(n, n) for n in EDGES]))
    check(make([(20, 20 + n) for n in EDGES], num_heads=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", CUDA_CAPPED_HEAD_DIMS)
def test_capped_scores(dtype: torch.dtype, head_dim: int) -> None:
    """Scores below, around and far beyond the cap, in decode rows and others."""
    for softcap, spread in ((50.0, 1.0), (50.0, 30.0), (3.0, 4.0), (1.5, 400.0)):
        for window in (0, 30):
            check(
                Case.make(
                    MIX, head_dim=head_dim, dtype=dtype, softcap=softcap, spread=spread,
                    window=window,
                )
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads", [(1, 1), (4, 4), (6, 2), (7, 1), (8, 1), (10, 2), (28, 4), (16, 1), (24, 1), (64, 1)]
)
def test_groups(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    num_heads, num_kv_heads = heads
    for head_dim in CUDA_HEAD_DIMS:
        rows = [(1, 90), (9, 33), (1, 128), (1, 2), (2, 700), (4, 65), (16, 300)]
        check(
            Case.make(
                rows, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype
            )
        )


@pytest.mark.parametrize("window", [1, 2, 15, 16, 63, 64, 65, 100, 1000])
def test_windows(window: int) -> None:
    for dtype, head_dim in zip(DTYPES * 2, CUDA_HEAD_DIMS, strict=True):
        check(Case.make(MIX, window=window, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("block_size", [1, 4, 16, 32, 64, 256])
def test_block_sizes(block_size: int) -> None:
    for head_dim in CUDA_HEAD_DIMS:
        check(
            Case.make(
                MIX, block_size=block_size, head_dim=head_dim, dtype=torch.bfloat16, window=90
            )
        )


def test_blocks_before_the_window_are_not_touched() -> None:
    case = Case.make([(1, 200), (20, 200)], window=30, dtype=torch.bfloat16)
    expected = run(case)
    case.block_table[case.row_slots[0].long(), : 170 // 16] = -1
    case.block_table[case.row_slots[1].long(), : 151 // 16] = 10**6
    assert torch.equal(run(case), expected)


def test_padded_rows_write_nothing() -> None:
    case = Case.make([(1, 20), (2, 0), (1, 30), (0, 0), (40, 0), (50, 60)], dtype=torch.bfloat16)
    case.row_slots[2] = -1  # padding that has lengths
    out = run(case)
    assert out[1:44].isnan().all()
    oracle.assert_ratio(out[44:], case.twin()[44:], case.exact()[44:])
    case = Case.make([(0, 0)] * 5, dtype=torch.bfloat16)
    assert run(case).shape == case.q.shape
    case = Case.make([(3, 0), (1, 0)], dtype=torch.bfloat16)
    assert run(case).isnan().all()


def test_peaked_scores() -> None:
    """Scores in the hundreds: online softmax must neither overflow nor lose the maximum."""
    check(Case.make(MIX, spread=80.0, dtype=torch.bfloat16))
    check(Case.make([(1, 300), (64, 300)], spread=400.0, head_dim=128, dtype=torch.bfloat16))


@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_nan_in_one_sequence_stays_there(head_dim: int) -> None:
    for num_keys in (40, 3000):
        case = Case.make(
            [(1, num_keys), (8, num_keys), (40, num_keys + 9), (1, 40)], dtype=DTYPES[0],
            head_dim=head_dim,
        )  # fmt: skip
        for row, bad in enumerate((case.key_cache, case.value_cache, case.key_cache)):
            bad[case.block_table[case.row_slots[row].long(), 0], 3] = torch.nan
        out = run(case)
        assert out[:49].isnan().all() and out[49].isfinite().all()


def test_strided_views() -> None:
    case = to_card(Case.make(MIX, num_heads=4, num_kv_heads=2, dtype=torch.bfloat16))
    plan = fill(case, allocate(case))
    expected = attend(case, plan)
    qkv = torch.randn(len(case.q), (4 + 2 + 2) * 64, device=CARD, dtype=torch.bfloat16)
    qkv[:, : 4 * 64] = case.q.flatten(1)
    case.q = qkv.view(len(case.q), 8, 64)[:, :4]
    both = torch.stack((case.key_cache, case.value_cache), 1)
    case.key_cache, case.value_cache = both[:, 0], both[:, 1]
    assert torch.equal(attend(case, plan), expected)
    # Keys and values of a head next to each other: blocks, heads, tokens.
    case.key_cache = case.key_cache.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attend(case, plan), expected)


@pytest.mark.parametrize("query_len", [1, 4, 33])
def test_a_decode_bound_gives_the_same(query_len: int) -> None:
    case = to_card(Case.make([(query_len, 900), (query_len, 70)], dtype=torch.bfloat16))
    plan = fill(case, allocate(case))
    assert torch.equal(attend(case, plan, query_len), attend(case, plan))


def test_a_plan_is_good_for_many_calls() -> None:
    """What paged_attention leaves in the workspace changes no later result."""
    mixes = ([(1, 3000), (1, 5), (1, 1500)], MIX, [(70, 2000)], [(1, 8000)])
    cases = [to_card(Case.make(rows, dtype=torch.bfloat16)) for rows in mixes]
    largest = attention_plan.allocate(
        max(len(case.q) for case in cases), max(len(case.seq_lens) for case in cases),
        num_heads=4, num_kv_heads=2, head_dim=64, device=CARD,
    )  # fmt: skip
    first = [attend(case, fill(case, allocate(case))) for case in cases]
    for _ in range(3):
        for case, expected in zip(cases, first, strict=True):
            fill(case, largest)
            for _ in range(3):
                assert torch.equal(
                    attend(case, largest).view(torch.int16), expected.view(torch.int16)
                )


def test_a_graph_follows_the_lengths() -> None:
    rows = [(1, 2000), (1, 100), (1, 1), (1, 700)]
    case = to_card(Case.make(rows, num_heads=8, dtype=torch.bfloat16, head_dim=128))
    plan = fill(case, allocate(case))
    out = attend(case, plan, 1)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        fill(case, plan)
        captured = attend(case, plan, 1)
    for lens in ([2000, 100, 1, 700], [3, 1, 1, 699], [1234, 64, 0, 0]):
        case.seq_lens.copy_(torch.tensor(lens))
        graph.replay()
        replayed = captured.clone()
        fresh = fill(case, allocate(case))
        out = attend(case, fresh, 1)
        assert torch.equal(replayed.view(torch.int16), out.view(torch.int16))


@pytest.mark.parametrize(("head_dim", "softcap"), [*KINDS[:4], (256, 50.0)])
@pytest.mark.parametrize("window", [0, 1000])
def test_long_prefill(head_dim: int, softcap: float, window: int) -> None:
    """8192 tokens, some of them after a context, beside decode rows."""
    torch.manual_seed(0)
    rows = [(1, 5000), (8192, 8192), (3, 70), (1000, 9000)]
    case = make_on_card(rows, num_heads=4, num_kv_heads=2, head_dim=head_dim, window=window)
    case.softcap = softcap
    out = attend(case, fill(case, allocate(case)))
    starts = case.cu_seqlens_q.tolist()
    for row in range(len(rows)):
        k, v = case.keys[row], case.values[row]
        plain = sdpa(case, row, k, v, torch.float32).bfloat16()
        exact = sdpa(case, row, k, v, torch.float64)
        oracle.assert_ratio(out[starts[row] : starts[row + 1]], plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", CUDA_HEAD_DIMS)
def test_many_short_prompts(dtype: torch.dtype, head_dim: int) -> None:
    """More work than the card has multiprocessors, so that blocks go from one to the next."""
    rows = [(17 + 5 * i, 17 + 5 * i + i % 3 * 50) for i in range(24)]
    check(Case.make(rows, num_heads=32, num_kv_heads=8, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "softcap"), [(96, 0.0), (128, 0.0), (128, 50.0), (256, 50.0)])
def test_long_decode(dtype: torch.dtype, head_dim: int, softcap: float) -> None:
    torch.manual_seed(1)
    rows = [(1, 40000), (1, 1), (2, 20001), (1, 333), (1, 64)]
    case = make_on_card(rows, num_heads=16, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    case.softcap = softcap
    out = attend(case, fill(case, allocate(case)))
    starts = case.cu_seqlens_q.tolist()
    for row in range(len(rows)):
        k, v = case.keys[row], case.values[row]
        plain = sdpa(case, row, k, v, torch.float32).to(dtype)
        exact = sdpa(case, row, k, v, torch.float64)
        oracle.assert_ratio(out[starts[row] : starts[row + 1]], plain, exact)


def make_on_card(
    rows: list[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    num_unused: int = 0,
) -> Case:
    """As Case.make, on the card and quickly; num_unused blocks come before those in use."""
    block_size = 16
    blocks_of = [-(-seq_len // block_size) for _, seq_len in rows]
    num_blocks = num_unused + sum(blocks_of)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    caches = [torch.empty(shape, dtype=dtype, device=CARD) for _ in range(2)]
    free = (torch.randperm(sum(blocks_of), device=CARD) + num_unused).split(blocks_of)
    table = torch.full((len(rows), max(blocks_of)), -1, dtype=torch.int32, device=CARD)
    parts: list[list[Tensor]] = [[], []]
    for row, ids in enumerate(free):
        table[row, : len(ids)] = ids
        for cache, kept in zip(caches, parts, strict=True):
            cache[ids] = torch.randn(len(ids), *shape[1:], device=CARD).to(dtype)
            tail = ids[-1], rows[row][1] - block_size * (len(ids) - 1)
            cache[tail[0], tail[1] :] = torch.nan
            kept.append(cache[ids].flatten(0, 1)[: rows[row][1]])
    starts = torch.tensor([0] + [query_len for query_len, _ in rows]).cumsum(0)
    return Case(
        q=torch.randn(int(starts[-1]), num_heads, head_dim, device=CARD).to(dtype),
        key_cache=caches[0],
        value_cache=caches[1],
        block_table=table,
        row_slots=torch.arange(len(rows), dtype=torch.int32, device=CARD),
        cu_seqlens_q=starts.int().to(CARD),
        seq_lens=torch.tensor([n for _, n in rows], dtype=torch.int32, device=CARD),
        scale=head_dim**-0.5,
        window=window,
        keys=parts[0],
        values=parts[1],
    )


def test_caches_beyond_two_to_the_31_elements() -> None:
    elements = 16 * 8 * 128
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory on the card")
    results = []
    for num_unused in (0, 2**31 // elements + 100):
        torch.manual_seed(2)
        torch.cuda.manual_seed(2)
        case = make_on_card(
            [(1, 1000), (100, 300), (2, 64)], num_heads=32, num_kv_heads=8, head_dim=128,
            num_unused=num_unused,
        )  # fmt: skip
        results.append(attend(case, fill(case, allocate(case))))
    assert case.key_cache.numel() > 2**31
    assert results[0].isfinite().all() and torch.equal(*results)


def test_random_mixes() -> None:
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(40):
        rows = []
        for _ in range(pick(1, 9)):
            query_len = pick(1, 90) if pick(0, 2) else pick(1, 5)
            rows.append((query_len, query_len + pick(0, 400)))
        num_kv_heads = pick(1, 4)
        head_dim, softcap = KINDS[pick(0, len(KINDS))]
        check(
            Case.make(
                rows,
                num_heads=num_kv_heads * pick(1, 9),
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                softcap=softcap,
                block_size=2 ** pick(0, 6),
                window=pick(1, 100) if pick(0, 2) else 0,
                dtype=DTYPES[pick(0, 2)],
            )
        )


def test_plans_cover_every_key_once() -> None:
    generator = torch.Generator().manual_seed(1)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for num_rows in (0, 1, 2, 7, 64, 256, 1500, 4096):
        for num_heads, num_kv_heads in ((32, 8), (8, 8), (28, 4), (20, 1)):
            rows = []
            for _ in range(num_rows):
                query_len = pick(1, 300) if pick(0, 10) == 0 else pick(0, 5)
                rows.append((query_len, query_len + pick(0, 3000) if pick(0, 8) else 0))
            starts = torch.tensor([0] + [row[0] for row in rows]).cumsum(0).int()
            lens = torch.tensor([row[1] for row in rows], dtype=torch.int32)
            window = pick(1, 500) if pick(0, 2) else 0
            plan = attention_plan.allocate(
                int(starts[-1]), num_rows, num_heads=num_heads, num_kv_heads=num_kv_heads,
                head_dim=64, device=CARD,
            )  # fmt: skip
            plan.work.fill_(-(10**6))
            ops.plan_attention(
                starts.to(CARD), lens.to(CARD), plan, num_heads=num_heads,
                num_kv_heads=num_kv_heads, window=window,
            )  # fmt: skip
            made = plans.read(plan.work.cpu())
            plans.check(made, starts, lens, num_heads // num_kv_heads, window)
            assert len(made.decode) <= num_rows + len(made.ranges)
            partials = [item.partial for item in made.decode]
            assert max(partials, default=-1) < 2 * len(made.ranges)
            twin = torch.zeros(len(plan.work), dtype=torch.int32)
            reference.plan_attention(starts, lens, num_heads, num_kv_heads, window, twin)
            assert len(plans.read(twin).prefill) <= len(made.prefill)


@pytest.mark.parametrize("lens", [[32768] * 8, [4096] * 16, [512] * 256, [131072, 1, 50, 3000]])
def test_decode_is_cut_evenly(lens: list[int]) -> None:
    plan = attention_plan.allocate(
        len(lens), len(lens), num_heads=32, num_kv_heads=8, head_dim=128, device=CARD
    )
    starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=CARD)
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=CARD)
    ops.plan_attention(starts, seq_lens, plan, num_heads=32, num_kv_heads=8)
    ranges = plans.read(plan.work.cpu()).ranges
    tiles = [sum(item.num_tiles for item in items) for items in ranges]
    even = -(-sum(tiles) // len(ranges))
    assert max(tiles) <= even + 4 and sum(tiles) == sum(-(-n // 64) for n in lens)


def test_bad_arguments() -> None:
    case = to_card(Case.make([(2, 20), (1, 30)], dtype=torch.bfloat16))
    plan = fill(case, allocate(case))
    for field, value, message in (
        ("q", case.q.float(), "q must be bfloat16 or float16, got Float"),
        ("q", case.q.half(), "key_cache is BFloat16, q is Half"),
        ("q", case.q[:, :3], "3 heads are not a multiple of 2 KV heads"),
        ("key_cache", case.key_cache[:-1], "value_cache and key_cache differ in shape"),
        ("seq_lens", case.seq_lens[:1], "size 0 of seq_lens is 1, expected 2"),
        ("block_table", case.block_table.cpu(), "block_table must be on a CUDA device"),
    ):
        before = getattr(case, field)
        setattr(case, field, value)
        with pytest.raises(RuntimeError, match=message):
            attend(case, plan)
        setattr(case, field, before)
    small = ops.AttentionPlan(work=plan.work[:100], workspace=plan.workspace)
    with pytest.raises(RuntimeError, match="work 100 and workspace .* must have"):
        attend(case, small)
    with pytest.raises(RuntimeError, match="needs a plan"):
        ops.paged_attention(
            *(getattr(case, name) for name in TENSORS), softmax_scale=case.scale, plan=None
        )
    for bad in (
        Case.make([(1, 3)], head_dim=80), Case.make([(1, 3)], block_size=7),
        Case.make([(1, 3)], softcap=2.0), Case.make([(1, 3)], head_dim=96, softcap=-1.0),
    ):  # fmt: skip
        moved = to_card(bad)
        moved.q, moved.key_cache = moved.q.half(), moved.key_cache.half()
        moved.value_cache = moved.value_cache.half()
        words = "is none of 64, 96|not a power of two|has no kernel at head_dim|must be 0 or more"
        with pytest.raises(RuntimeError, match=words):
            attend(moved, plan)
