"""The memory formulas against numbers worked out by hand, and what is done when it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.config import EngineConfig
from pyserve.engine.graphs import NODE_BYTES
from pyserve.engine.planner import (
    MAX_BLOCKS,
    MAX_CONTEXT_BYTES,
    MODULE_BYTES,
    CardMemory,
    HostMemory,
    MemoryPlan,
    fit_kv,
    format_ledger,
    is_ledger_true,
    plan_memory,
)
from pyserve.engine.state import activation_bytes
from pyserve.errors import ConfigError, PlanError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import META, Placement
from pyserve.ops import attention_plan, sample_workspace
from tests.engine.tiny import CONFIG, engine_config
from tests.model.described import with_windows

MODEL = ModelConfig.from_hf(CONFIG)  # 2 layers, 4 heads of 16, 2 KV heads, vocabulary of 97
SHAPES = build_model(MODEL, Placement(torch.float32, META), max_model_len=1)
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, head_dim, float32
WEIGHT_BYTES = 1_000_000


def plan(available_bytes: int = 2**30, **overrides: object) -> MemoryPlan:
    return plan_memory(
        SHAPES,
        engine_config(Path("unused"), **overrides),
        weight_bytes=WEIGHT_BYTES,
        memory=HostMemory(available_bytes),
    )


def fixed_bytes(result: MemoryPlan) -> int:
    return sum(num_bytes for name, num_bytes in result.ledger if name != "KV cache")


def test_the_ledger_by_hand() -> None:
    result = plan()
    assert result.num_slots == 8 and result.max_model_len == 256
    assert result.num_blocks == 8 * 16, "every slot can hold a whole context"
    assert result.ledger == (
        ("weights", 1_000_000),
        ("rope table", 256 * 16 * 4),
        ("activations", 64 * 4 * (2 * 32 + 2 * 64 + 2 * 32) + 256),  # sums of squares
        ("logits", 8 * (4 * (97 + 32) + 4)),
        ("logprobs", 4 * (8 * 97 + 8 + 8 + 2 * 64 + (8 + 64) * 42)),
        ("slots", 8 * (680 * 4 + 16 * 4 + 97 * 2)),
        ("step buffers", 4 * (16 + 7 * 8 + 64 + 2**16) + 64 * 16 + 8 * 24 + 4),
        ("token masks", 8 * 4 * (4 + 1)),
        ("KV cache", 128 * BLOCK_BYTES),
    )


def test_the_mlp_is_the_larger_part_of_a_usual_layer() -> None:
    config = ModelConfig.from_hf(CONFIG | {"intermediate_size": 100})
    model = build_model(config, Placement(torch.bfloat16, META), max_model_len=1)
    assert activation_bytes(model, 128) == 128 * 2 * (2 * 32 + 3 * 100)


def test_logits_exist_a_tile_at_a_time() -> None:
    result = plan(2**34, max_num_seqs=4096, max_num_batched_tokens=4096)
    assert result.logits_tile_rows == 64
    assert dict(result.ledger)["logits"] == 64 * (4 * (97 + 32) + 4)


def test_slots_are_as_many_as_a_step_has_tokens() -> None:
    assert plan(max_num_batched_tokens=5).num_slots == 5


def test_a_cpu_gets_512_mib_of_kv_by_default_but_at_least_one_sequence() -> None:
    assert plan(2**34, max_num_seqs=4096, max_num_batched_tokens=4096).num_blocks == 2**29 // 8192
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 256}
    wide = ModelConfig.from_hf(CONFIG | heads | {"num_hidden_layers": 64})  # 128 MiB a block
    result = plan_memory(
        build_model(wide, Placement(torch.float32, META), max_model_len=1),
        engine_config(Path("unused")),
        weight_bytes=0,
        memory=HostMemory(2**40),
    )
    assert result.num_blocks == 16 and result.max_model_len == 256


def test_kv_bytes_given_are_the_kv_cache() -> None:
    result = plan(kv_cache_memory_bytes=20 * BLOCK_BYTES + 5)
    assert result.num_blocks == 20 and result.max_model_len == 256


@pytest.mark.parametrize("given", ["memory", "kv bytes"])
def test_a_context_that_does_not_fit_shrinks(given: str) -> None:
    if given == "memory":
        # What 96 tokens need beside the KV cache, 6 blocks, and nearly a seventh.
        rest = fixed_bytes(plan(max_model_len=96))
        result = plan(int((rest + 7 * BLOCK_BYTES - 1000) / 0.9))
    else:
        result = plan(kv_cache_memory_bytes=7 * BLOCK_BYTES - 1)
    assert result.max_model_len == 96 and result.num_blocks == 6
    assert result.ledger[-1] == ("KV cache", 6 * BLOCK_BYTES)


def test_a_context_that_was_asked_for_and_does_not_fit_is_an_error() -> None:
    with pytest.raises(PlanError) as caught:
        plan(max_model_len=200, kv_cache_memory_bytes=7 * BLOCK_BYTES)
    lines = str(caught.value).splitlines()
    assert "a context of 200 tokens does not fit" in lines[0]
    assert "--max-model-len 112 is the most that would. It needs" in lines[0]
    assert lines[-2].split() == ["KV", "cache", "0.1", "MiB"]
    assert lines[-1].split()[0] == "total"
    assert plan(max_model_len=112, kv_cache_memory_bytes=7 * BLOCK_BYTES).num_blocks == 7


def test_too_little_memory_for_anything() -> None:
    with pytest.raises(PlanError, match="nothing would fit"):
        plan(WEIGHT_BYTES)


def test_more_context_than_the_model_has() -> None:
    with pytest.raises(ConfigError, match="--max-model-len is 257, the limit of this model is 256"):
        plan(max_model_len=257)


def test_a_context_that_is_no_whole_number_of_blocks() -> None:
    result = plan(max_model_len=100)
    assert result.max_model_len == 100 and result.num_blocks == 8 * 7


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_never_exceeds_what_is_allowed(seed: int) -> None:
    available = 2_000_000 + seed * 77_777
    result = plan(available)
    assert sum(num_bytes for _, num_bytes in result.ledger) <= 0.9 * available
    assert result.num_blocks * 16 >= result.max_model_len


def test_the_ledger_is_printed_aligned_with_a_sum() -> None:
    text = format_ledger([("weights", 3 * 2**20), ("KV cache", 2**31)])
    assert text.splitlines() == [
        "  weights                  3.0 MiB",
        "  KV cache             2,048.0 MiB",
        "  total                2,051.0 MiB",
    ]


# A Llama of 8 billion parameters in bfloat16, and cards to put it on.
LLAMA = ModelConfig.from_hf(
    CONFIG
    | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
)  # fmt: skip
LLAMA_SHAPES = build_model(LLAMA, Placement(torch.bfloat16, META), max_model_len=1)
LLAMA_WEIGHT_BYTES = 16_060_522_496
LLAMA_BLOCK_BYTES = 16 * 32 * 2 * 8 * 128 * 2  # 2 MiB
MIB, GIB = 2**20, 2**30
BIG_CARD = CardMemory(total_bytes=140 * GIB, used_bytes=600 * MIB)
SMALL_CARD = CardMemory(total_bytes=24 * GIB, used_bytes=500 * MIB)


def settings(**overrides: object) -> EngineConfig:
    return EngineConfig(model_path=Path("unused"), **overrides)  # type: ignore[arg-type]


def card_plan(card: CardMemory = BIG_CARD, **overrides: object) -> MemoryPlan:
    return plan_memory(
        LLAMA_SHAPES, settings(**overrides), weight_bytes=LLAMA_WEIGHT_BYTES, memory=card
    )


def test_the_ledger_of_a_card_by_hand() -> None:
    result = card_plan()
    assert (result.num_slots, result.max_num_batched_tokens) == (256, 8192)
    assert (result.logits_tile_rows, result.max_model_len) == (256, 131072)
    work = attention_plan.allocate(
        8192, 256, num_heads=32, num_kv_heads=8, head_dim=128, device=torch.device("meta")
    )
    sampling = sample_workspace.allocate(256, 128256, device=torch.device("meta"))
    step_words = 16 + 7 * 256 + 8192 + (4 + 680 + 131072 + 3 * 8192)
    assert result.ledger[:-1] == (
        ("CUDA context", 600 * MIB),
        ("CUDA modules", MODULE_BYTES),
        # 24 numbers of tokens up to 1,024, two records each; 16 numbers of sampled rows.
        ("CUDA graphs", NODE_BYTES * 10 * (2 * 24 * (32 + 1) + 16)),
        ("weights", LLAMA_WEIGHT_BYTES),
        ("rope table", 131072 * 128 * 4),
        ("activations", 8192 * 2 * (2 * 4096 + 3 * 14336) + 32 * 4096 // 16 * 4),
        ("logits", 256 * (2 * (128256 + 4096) + 4)),
        ("logprobs", 256 * 2 * 128256 + 4 * (256 + 256 + 2 * 8192 + (256 + 8192) * 42)),
        ("attention plans", work.work.nbytes + work.workspace.nbytes),
        ("sampling", sampling.nbytes),
        ("slots", 256 * (680 * 4 + 8192 * 4 + 128256 * 2)),
        ("step buffers", 4 * step_words + 8192 * 16 + 256 * 24 + 4),
        ("token masks", 256 * 4 * (128256 // 32 + 1)),
    )
    allowed = int(0.9 * 140 * GIB)
    assert allowed - LLAMA_BLOCK_BYTES < result.total_bytes <= allowed, "KV takes what is left"
    assert result.num_blocks * LLAMA_BLOCK_BYTES == result.ledger[-1][1]


def test_the_sizes_of_a_step_follow_the_card_unless_they_are_given() -> None:
    assert card_plan(SMALL_CARD).max_num_batched_tokens == 2048
    assert card_plan(max_num_batched_tokens=100).max_num_batched_tokens == 100
    few = card_plan(max_num_seqs=3)
    assert (few.num_slots, few.logits_tile_rows) == (3, 3)
    host = plan_memory(SHAPES, settings(), weight_bytes=0, memory=HostMemory(2**34))
    assert (host.max_num_batched_tokens, host.logits_tile_rows) == (2048, 64)


def test_without_graphs_the_kv_cache_has_their_memory() -> None:
    eager = settings(enforce_eager=True)
    plan = plan_memory(SHAPES, eager, weight_bytes=LLAMA_WEIGHT_BYTES, memory=BIG_CARD)
    assert dict(plan.ledger)["CUDA graphs"] == 0
    assert plan.num_blocks > card_plan().num_blocks


def test_each_window_has_its_attention_plan() -> None:
    def plan_bytes(*windows: int) -> int:
        config = with_windows(LLAMA, *windows)
        model = build_model(config, Placement(torch.bfloat16, META), max_model_len=1)
        result = plan_memory(model, settings(), weight_bytes=0, memory=BIG_CARD)
        return dict(result.ledger)["attention plans"]

    assert plan_bytes(0, 512) == 2 * plan_bytes(0, 0) == 2 * plan_bytes(512, 512)


def test_a_card_on_which_the_whole_context_does_not_fit() -> None:
    result = card_plan(SMALL_CARD)
    assert 16 * 1000 < result.max_model_len < 131072
    assert result.max_model_len == 16 * result.num_blocks
    assert result.total_bytes <= 0.9 * 24 * GIB
    with pytest.raises(PlanError) as caught:
        card_plan(SMALL_CARD, max_model_len=131072)
    first, *ledger = str(caught.value).splitlines()
    assert "a context of 131072 tokens does not fit: 22,118.4 MiB may be used" in first
    assert "(--gpu-memory-utilization 0.9 of the card's 24,576.0 MiB)" in first
    assert "other processes" not in first
    assert any(line.split()[:2] == ["CUDA", "context"] for line in ledger)
    fitting = int(first.partition("--max-model-len ")[2].split()[0])
    assert card_plan(SMALL_CARD, max_model_len=fitting).max_model_len == fitting
    with pytest.raises(PlanError):
        card_plan(SMALL_CARD, max_model_len=fitting + 16)


def test_what_other_processes_hold_is_not_shared_out() -> None:
    alone, beside = BIG_CARD, CardMemory(140 * GIB, 30 * GIB + MAX_CONTEXT_BYTES)
    assert (alone.context_bytes, alone.others_bytes) == (600 * MIB, 0)
    assert (beside.context_bytes, beside.others_bytes) == (MAX_CONTEXT_BYTES, 30 * GIB)
    result = card_plan(beside)
    assert result.total_bytes + 30 * GIB <= int(0.9 * 140 * GIB)
    assert result.num_blocks < card_plan(alone).num_blocks


def test_a_card_that_others_hold_most_of() -> None:
    with pytest.raises(PlanError) as caught:
        card_plan(CardMemory(24 * GIB, 12 * GIB + MAX_CONTEXT_BYTES))
    first = str(caught.value).splitlines()[0]
    assert "less 12,288.0 MiB that other processes hold" in first
    assert "nothing would fit: take a smaller model" in first
    assert ", or end the other processes (see nvidia-smi). It needs" in first
    with pytest.raises(PlanError, match=r": 0\.0 MiB may be used"):
        card_plan(CardMemory(24 * GIB, 24 * GIB))


def test_a_tiny_model_gets_no_more_blocks_than_the_host_can_keep() -> None:
    tiny = {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 64}
    config = ModelConfig.from_hf(CONFIG | tiny)
    model = build_model(config, Placement(torch.bfloat16, META), max_model_len=1)
    result = plan_memory(model, settings(), weight_bytes=0, memory=BIG_CARD)
    assert result.num_blocks == MAX_BLOCKS


def test_the_kv_cache_gets_what_is_really_free() -> None:
    config = settings()
    result = card_plan()
    # All but the KV cache and the records that are made on it.
    rest = result.total_bytes - result.ledger[-1][1] - dict(result.ledger)["CUDA graphs"]
    as_planned = CardMemory(140 * GIB, rest)
    assert fit_kv(result, config, before=BIG_CARD, now=as_planned) == result
    less = CardMemory(140 * GIB, rest - GIB)
    assert fit_kv(result, config, before=BIG_CARD, now=less) == result, "never more than planned"
    more = CardMemory(140 * GIB, rest + GIB)
    fitted = fit_kv(result, config, before=BIG_CARD, now=more)
    assert fitted.num_blocks in (result.num_blocks - 512, result.num_blocks - 511)
    assert fitted.ledger[-1] == ("KV cache", fitted.num_blocks * LLAMA_BLOCK_BYTES)
    assert fitted.ledger[:-1] == result.ledger[:-1] and fitted.max_model_len == 131072
    elsewhere = fit_kv(result, config, before=BIG_CARD, now=more, block_bytes=2 * LLAMA_BLOCK_BYTES)
    assert elsewhere.num_blocks == fitted.num_blocks // 2, "a rank of a pipeline may hold more"
    assert elsewhere.ledger[-1] == ("KV cache", elsewhere.num_blocks * LLAMA_BLOCK_BYTES)


def test_a_context_that_does_not_fit_any_more() -> None:
    # Others have taken all but 100 blocks since.
    graph_bytes = dict(card_plan().ledger)["CUDA graphs"]
    now = CardMemory(140 * GIB, int(0.9 * 140 * GIB) - 100 * LLAMA_BLOCK_BYTES - graph_bytes)
    shrunk = fit_kv(card_plan(), settings(), before=BIG_CARD, now=now)
    assert (shrunk.num_blocks, shrunk.max_model_len) == (100, 1600)
    asked: dict[str, Any] = {"max_model_len": 1601}
    with pytest.raises(PlanError) as caught:
        fit_kv(card_plan(**asked), settings(**asked), before=BIG_CARD, now=now)
    assert "a context of 1601 tokens does not fit any more" in str(caught.value)
    assert "nvidia-smi" in str(caught.value)
    full = CardMemory(140 * GIB, 139 * GIB)
    with pytest.raises(PlanError, match="a context of 1 tokens does not fit any more"):
        fit_kv(card_plan(), settings(), before=BIG_CARD, now=full)


def test_the_ledger_is_held_against_the_card() -> None:
    result = card_plan()
    others = CardMemory(140 * GIB, 8 * GIB + MAX_CONTEXT_BYTES)

    def judge(shown_bytes: int) -> tuple[bool, str]:
        now = CardMemory(140 * GIB, shown_bytes + others.others_bytes)
        return is_ledger_true(result, before=others, now=now)

    assert judge(result.total_bytes)[0]
    assert judge(int(result.total_bytes * 1.029))[0] and judge(int(result.total_bytes / 1.029))[0]
    is_true, line = judge(int(result.total_bytes * 1.05))
    assert not is_true and "(-4.8%)" in line and "GiB" in line
    assert not judge(int(result.total_bytes / 1.05))[0]
