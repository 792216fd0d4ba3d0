"""The ops of latent attention on a card: ratio rule against float64; and whole models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyserve import ops
from pyserve.limits import CUDA_LATENT_SIZES
from pyserve.model.layers.latent_attention import num_tiles
from pyserve.ops import attention_plan, latent, reference_latent
from tests.gpu.test_attention import CARD, EDGES, make_on_card, to_card
from tests.gpu.test_full_model import SETTINGS, Checkpoint, assert_ratio
from tests.gpu.test_run_ahead import assert_replays
from tests.model.oracle import CASES
from tests.ops import oracle
from tests.ops.test_attention import MIX, Case
from tests.ops.test_latent import rope_case

DTYPES = (torch.bfloat16, torch.float16)
SIZE, ROPE_DIM = CUDA_LATENT_SIZES


def allocate(num_tokens: int, num_rows: int, num_heads: int) -> ops.AttentionPlan:
    return attention_plan.allocate(
        num_tokens, num_rows, num_heads=num_heads, num_kv_heads=num_tiles(num_heads),
        head_dim=SIZE, device=CARD,
    )  # fmt: skip


def attend(case: Case, plan: ops.AttentionPlan | None = None) -> Tensor:
    """Of a case on the card, into an output full of NaN."""
    num_heads = case.q.shape[1]
    plan = plan or allocate(len(case.q), len(case.seq_lens), num_heads)
    ops.plan_attention(
        case.cu_seqlens_q, case.seq_lens, plan, num_heads=num_heads,
        num_kv_heads=num_tiles(num_heads),
    )  # fmt: skip
    out = case.q.new_full((len(case.q), num_heads, SIZE), torch.nan)
    latent.latent_attention(
        case.q, case.key_cache.squeeze(2), case.block_table, case.row_slots, case.cu_seqlens_q,
        case.seq_lens, softmax_scale=case.scale, out=out, plan=plan,
    )  # fmt: skip
    return out


def exact_and_plain(case: Case, row: int) -> tuple[Tensor, Tensor]:
    """Of one row on the card: at float64, and in float32 rounded once."""
    begin, end = case.cu_seqlens_q[row : row + 2].tolist()
    kept = case.keys[row].squeeze(1).to(CARD)
    position = torch.arange(len(kept) - (end - begin), len(kept), device=CARD)[:, None]
    is_hidden = torch.arange(len(kept), device=CARD) > position
    results = []
    for dtype in (torch.float64, torch.float32):
        q, c = case.q[begin:end].to(CARD, dtype), kept.to(dtype)
        scores = torch.einsum("qhd,kd->hqk", q, c) * case.scale
        weights = scores.masked_fill_(is_hidden, -torch.inf).softmax(-1)
        results.append(torch.einsum("hqk,kd->qhd", weights, c[:, :SIZE]))
    return results[0], results[1].to(case.q.dtype)


def check(case: Case) -> None:
    out = attend(to_card(case) if not case.q.is_cuda else case)
    starts = case.cu_seqlens_q.tolist()
    for row, keys in enumerate(case.keys):
        if len(keys):
            exact, plain = exact_and_plain(case, row)
            allowed = case.float32_error() if len(keys) < 1000 else 1e-5
            oracle.assert_ratio(
                out[starts[row] : starts[row + 1]], plain, exact, plain_float32_error=allowed
            )


def make(rows: list[tuple[int, int]], num_heads: int = 16, **changes: Any) -> Case:
    changes = {"dtype": torch.bfloat16} | changes
    return Case.make(rows, num_heads=num_heads, num_kv_heads=1, head_dim=SIZE + ROPE_DIM, **changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [1, 5, 16, 20, 32, 128])
def test_heads(dtype: torch.dtype, num_heads: int) -> None:
    check(make(MIX, num_heads, dtype=dtype))


def test_edges_of_tiles() -> None:
    for num_heads in (4, 16):
        check(make([(1, n) for n in EDGES], num_heads))
        check(make([(n, n) for n in EDGES], num_heads))
        check(make([(20, 20 + n) for n in EDGES], num_heads))


@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_block_sizes(block_size: int) -> None:
    check(make(MIX, block_size=block_size))


def test_peaked_scores() -> None:
    check(make(MIX, spread=80.0))


def test_padded_rows_write_nothing() -> None:
    case = make([(1, 20), (2, 0), (1, 30), (0, 0), (40, 0), (50, 60)])
    case.row_slots[2] = -1  # padding that has lengths
    out = attend(to_card(case))
    assert bool(out[1:44].isnan().all()) and bool(out[44:].isfinite().all())


def test_long_rows_and_one_workspace_for_all() -> None:
    """Decode split over the card, a long prompt, a chunk of one; twice in what the others left."""
    torch.manual_seed(1)
    rows = [(1, 40000), (1, 1), (1, 333), (700, 9000), (1, 64)]
    plan = allocate(1000, 8, 16)
    for _ in range(2):
        case = make_on_card(rows, num_heads=16, num_kv_heads=1, head_dim=SIZE + ROPE_DIM)
        check(case)
        first = attend(case, plan)
        assert torch.equal(attend(case, plan), first)


def test_strided_views() -> None:
    case = to_card(make(MIX))
    room = case.q.new_full((len(case.q), 16, SIZE + ROPE_DIM + 64), torch.nan)
    room[..., 64:] = case.q
    other = replace(case, q=room[..., 64:])
    assert torch.equal(attend(other).view(torch.int16), attend(case).view(torch.int16))


@pytest.mark.parametrize("has_pairs", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rope_dim"), [(16, 8), (512, 64)])
def test_what_is_kept(size: int, rope_dim: int, dtype: torch.dtype, has_pairs: bool) -> None:
    def made() -> dict[str, Any]:
        case = rope_case(size, rope_dim, dtype)
        return {key: it.to(CARD) if isinstance(it, Tensor) else it for key, it in case.items()}

    mine, twin = made(), made()
    latent.rope_write_latent(**mine, has_pairs=has_pairs)
    reference_latent.rope_write_latent(**twin, has_pairs=has_pairs)
    for name in ("rotated", "latent_cache"):
        torch.testing.assert_close(mine[name], twin[name], rtol=0.008, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "k"), [(16, 512, 128), (20, 512, 192), (5, 70, 512)])
def test_batched_linear(dtype: torch.dtype, batch: int, n: int, k: int) -> None:
    weight = torch.randn(batch, n, k, device=CARD).to(dtype)
    for m in (1, 3, 8, 9, 70):
        x = torch.randn(m, batch, k + 64, device=CARD).to(dtype)[..., :k]
        room = x.new_full((m, batch, n + 64), torch.nan)
        latent.batched_linear(x, weight, room[..., :n])
        exact = torch.einsum("mbk,bnk->mbn", x.double(), weight.double())
        plain = torch.einsum("mbk,bnk->mbn", x.float(), weight.float()).to(dtype)
        oracle.assert_ratio(room[..., :n], plain, exact, plain_float32_error=1e-5)
        assert bool(room[..., n:].isnan().all())


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (CASES[name].family, CASES[name].changes | {"kv_lora_rank": SIZE} | changes)
    for name, changes in {
        "deepseek-v2-lite": {"qk_rope_head_dim": ROPE_DIM, "qk_nope_head_dim": 64},
        "deepseek-v3": {"qk_rope_head_dim": ROPE_DIM, "qk_nope_head_dim": 64, "v_head_dim": 64},
        "glm4-moe-lite": {"qk_rope_head_dim": ROPE_DIM, "num_hidden_layers": 4},
    }.items()
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return Checkpoint.made(folder, MODELS[request.param], torch.bfloat16)


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_of_whole_models(settings: str, checkpoint: Checkpoint) -> None:
    assert_ratio(checkpoint, settings)


def test_replays_of_whole_models(checkpoint: Checkpoint) -> None:
    assert_replays(checkpoint.ours)
