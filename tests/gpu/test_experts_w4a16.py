"""grouped_linear_w4a16 on a card: rows by the 4-bit integers of their experts, few and many of
each; in a graph; and whole models that have them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pyserve.ops import STORE, experts, quantised, w4a16
from tests.gpu.test_experts import counted, empty_routing
from tests.gpu.test_full_model import SETTINGS, Checkpoint, assert_ratio, load_on_card
from tests.gpu.test_linear_w4a16 import with_scales_of
from tests.gpu.test_run_ahead import assert_replays
from tests.model import quantised_files
from tests.model.test_fp8 import configure
from tests.model.test_quantised_experts import SKIPPED
from tests.ops import oracle

CARD = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)


def make(count: int, n: int, k: int, group_size: int, dtype: torch.dtype) -> quantised.W4A16Matrix:
    """Of so many experts, with scales as a checkpoint of this dtype has them."""
    shape = count, *w4a16.packed_shape(n, k, group_size)
    packed = torch.zeros(shape, dtype=torch.int32, device=CARD)
    for number, one in enumerate(packed):
        w4a16.fill_with_noise(one, n, k, 0.05, torch.Generator(CARD).manual_seed(n + number))
        one.copy_(with_scales_of(one, dtype))
    return quantised.W4A16Matrix(packed)


def plain(matrix: quantised.W4A16Matrix, n: int, k: int) -> Tensor:
    return torch.stack([w4a16.dequantised(one, n, k) for one in matrix.packed])


def nan_like(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=CARD)


def activated(x: Tensor, matrix: quantised.W4A16Matrix, routing: experts.Routing, n: int) -> Tensor:
    """By gate and up of n rows each, from NaN."""
    num_rows = len(routing.order)
    out = nan_like(num_rows, n, dtype=x.dtype)
    room = nan_like(num_rows, x.shape[1], dtype=x.dtype)
    quantised.grouped_linear_silu_mul(x, matrix, routing, out, room, x.new_empty(0))
    return out


def stored(x: Tensor, matrix: quantised.W4A16Matrix, routing: experts.Routing, n: int) -> Tensor:
    out = nan_like(len(x), n, dtype=x.dtype)
    quantised.grouped_linear(x, matrix, routing, out, x.new_empty(0))
    return out


# Of each expert; those of an average of 12 and more go to the kernel for many rows on Hopper.
COUNTS = [
    (1, 0, 0), (0, 1, 1, 2), (3, 0, 5), (7, 9, 0, 0), (16, 2, 0, 14), (17, 0, 16), (40, 0, 33),
    (0, 100, 30, 1, 32), (0, 300, 129, 1, 128), (1000, 5, 0, 700),
]  # fmt: skip
SHAPES = [
    (4096, 4096, 128), (768, 2048, 128), (48, 96, 32), (80, 320, 64), (272, 672, 32), (16, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_rows_by_their_experts(n: int, k: int, group_size: int, dtype: torch.dtype) -> None:
    for counts in COUNTS:
        torch.manual_seed(n)
        routing, count = counted(*counts), len(counts)
        gate_up, down = (make(count, rows, k, group_size, dtype) for rows in (2 * n, n))
        x = torch.randn(sum(counts), k, device=CARD).to(dtype)
        in_order = x[routing.order.long()]
        results = activated(x, gate_up, routing, n), stored(in_order, down, routing, n)
        of_both = plain(gate_up, 2 * n, k), plain(down, n, k)
        for expert, (begin, end) in enumerate(pairwise(routing.offsets.tolist())):
            rows = in_order[begin:end]
            if begin == end:
                continue
            first, second = (weights[expert] for weights in of_both)
            by_plain = torch.nn.functional.linear(rows, first.to(dtype)).float()
            rounded = oracle.silu_mul(by_plain.double()).to(dtype)
            exact = oracle.silu_mul(rows.double() @ first.double().T)
            oracle.assert_ratio(results[0][begin:end], rounded, exact, plain_float32_error=2e-2)
            rounded = torch.nn.functional.linear(rows, second.to(dtype))
            exact = rows.double() @ second.double().T
            oracle.assert_ratio(results[1][begin:end], rounded, exact, plain_float32_error=2e-2)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_few_rows_are_those_of_linear(group_size: int, dtype: torch.dtype) -> None:
    """Bit by bit, where experts have fewer than 12 on average; what is behind them stays."""
    n, k, num_rows = 192, 896, 48
    offsets = torch.tensor([0, 0, 3, 4, 4, 30], device=CARD).int()
    order = torch.randperm(num_rows, device=CARD).int()
    empty = torch.empty(0, device=CARD)
    places = torch.zeros(num_rows, 1, dtype=torch.int32, device=CARD)
    routing = experts.Routing(empty, empty, places, order, offsets)
    gate_up, down = (make(5, rows, k, group_size, dtype) for rows in (2 * n, n))
    x = torch.randn(num_rows, k, device=CARD).to(dtype)
    first, second = activated(x, gate_up, routing, n), stored(x, down, routing, n)
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        for row in range(begin, end):
            wanted = nan_like(1, n, dtype=dtype)
            token = x[order[row].long(), None]
            gate_up.of_expert(expert).multiply(token, None, wanted, 2)
            assert torch.equal(first[row, None], wanted)
            down.of_expert(expert).multiply(x[row, None], None, wanted, STORE)
            assert torch.equal(second[row, None], wanted)
    end = int(offsets[-1])
    assert bool(first[end:].isnan().all()) and bool(second[end:].isnan().all())


@pytest.mark.sanitize
def test_rows_of_nan_keep_to_themselves() -> None:
    """Also the rows of the next expert that a tile holds, and what nobody wrote."""
    for counts in ((2, 3), (20, 30), (70, 90)):
        routing, matrix = counted(*counts), make(2, 512, 256, 128, torch.bfloat16)
        x = torch.randn(sum(counts), 256, device=CARD).bfloat16()
        outs = []
        for value in (1.0, torch.nan):
            x[routing.order[-1].long()] = value
            outs.append(activated(x, matrix, routing, 256))
        assert torch.equal(outs[0][:-1], outs[1][:-1]) and bool(outs[1][-1].isnan().all())


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 64, 512])
def test_a_layer_in_a_graph(num_tokens: int) -> None:
    """Captured with tokens that go to one expert, replayed with tokens that go elsewhere."""
    torch.manual_seed(num_tokens)
    hidden, size, count, top_k = 256, 256, 16, 4
    router = torch.randn(count, hidden, device=CARD).bfloat16()
    gate_up, down = (make(count, n, 256, 128, torch.bfloat16) for n in (2 * size, hidden))
    x = torch.zeros(num_tokens, hidden, dtype=torch.bfloat16, device=CARD)
    slots = torch.arange(num_tokens, device=CARD)
    routing = empty_routing(num_tokens, count, top_k, has_gate=False)
    made, rows = x.new_empty(num_tokens * top_k, size), x.new_empty(num_tokens * top_k, hidden)
    residual, scratch = torch.zeros_like(x), x.new_empty(0)

    def layer() -> None:
        experts.route(x, router, None, slots, experts.Rule(), routing)
        quantised.grouped_linear_silu_mul(x, gate_up, routing, made, rows, scratch)
        quantised.grouped_linear(made, down, routing, rows, scratch)
        experts.combine_experts(rows, routing, None, residual, is_adding=True)

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    for _ in range(3):
        x.normal_()
        slots[: num_tokens // 3] = -1
        residual.zero_()
        graph.replay()
        replayed = residual.clone()
        residual.zero_()
        layer()
        assert torch.equal(replayed, residual)
        assert bool(residual[num_tokens // 3 :].any(1).all())
        assert not bool(residual[: num_tokens // 3].any())


def test_refusals() -> None:
    routing, x = counted(1, 1), torch.randn(2, 128, device=CARD).bfloat16()
    matrix = make(2, 48, 128, 128, torch.bfloat16)
    op = torch.ops.pyserve.grouped_linear_w4a16
    rest = routing.offsets, 2, None
    with pytest.raises(RuntimeError, match="24 columns of gate and of up are no multiple of 16"):
        op(x, matrix.packed, routing.order, *rest, x.new_empty(2, 24))
    with pytest.raises(RuntimeError, match="the rows of x must be aligned to 16 bytes"):
        wide = torch.randn(2, 132, device=CARD).bfloat16()
        op(wide[:, :128], matrix.packed, None, *rest, x.new_empty(2, 48))
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16, got Float"):
        op(x.float(), matrix.packed, None, *rest, torch.empty(2, 48, device=CARD))


LLAMA: dict[str, Any] = {"hidden_size": 256, "head_dim": 64}
MIXTRAL = LLAMA | {"num_local_experts": 4, "intermediate_size": 384}
MODELS: dict[str, tuple[quantised_files.Kind, str, dict[str, Any]]] = {
    "awq-mixtral": (quantised_files.integers("awq-gemm", 128), "mixtral", MIXTRAL),
    # Rounding chooses no other experts here, neither ours nor transformers'.
    "awq-mixtral-of-all": (
        quantised_files.integers("awq-gemm", 128), "mixtral", MIXTRAL | {"num_experts_per_tok": 4}
    ),
    "gptq-qwen3-moe": (
        quantised_files.integers("gptq", 64), "qwen3_moe",
        LLAMA | {
            "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 320,
            "norm_topk_prob": True,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Checkpoint]:
    kind, family, changes = MODELS[request.param]
    saved = quantised_files.save(tmp_path_factory.mktemp("model"), kind, family, 0.08, **changes)
    configure(saved.folder, **SKIPPED.get(kind.config["quant_method"], {}))
    return [Checkpoint(load_on_card(saved.folder, dtype), saved.plain) for dtype in DTYPES]


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_of_bfloat16(settings: str, checkpoints: list[Checkpoint]) -> None:
    """Of whole models: transformers has the numbers that the integers stand for, rounded."""
    assert_ratio(checkpoints[0], settings)


def test_logits_of_float16(checkpoints: list[Checkpoint]) -> None:
    assert_ratio(checkpoints[1], "all")


def test_replays_and_running_ahead_give_the_same_tokens(checkpoints: list[Checkpoint]) -> None:
    assert_replays(checkpoints[0].ours)
