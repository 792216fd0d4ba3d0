"""The memory formulas against numbers worked out by hand, and what is done when it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyserve.engine import planner
from pyserve.engine.planner import HostMemory, MemoryPlan, format_ledger, plan_memory
from pyserve.errors import ConfigError, PlanError
from pyserve.model.config import ModelConfig
from pyserve.model.kv import KVSpec
from tests.engine.tiny import CONFIG, engine_config

MODEL = ModelConfig.from_hf(CONFIG)  # 2 layers, 4 heads of 16, 2 KV heads, vocabulary of 97
SPECS = [KVSpec(2, 16, torch.float32), KVSpec(2, 16, torch.float32)]
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, head_dim, float32
WEIGHT_BYTES = 1_000_000


def plan(available_bytes: int = 2**30, **overrides: object) -> MemoryPlan:
    return plan_memory(
        MODEL,
        engine_config(Path("unused"), **overrides),
        weight_bytes=WEIGHT_BYTES,
        kv_specs=SPECS,
        itemsize=4,
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
        ("activations", 64 * 4 * (3 * 32 + 2 * 64 + 2 * 32)),
        ("logits", 8 * 4 * (97 + 32)),
        ("rope table", 256 * 16 * 4),
        ("slots", 8 * (680 * 4 + 16 * 4 + 97 * 2)),
        ("step buffers", 4 * (16 + 7 * 8 + 64 + 2**16) + 64 * 16 + 8 * 24 + 4),
        ("KV cache", 128 * BLOCK_BYTES),
    )


def test_the_mlp_is_the_larger_part_of_a_usual_layer() -> None:
    model = ModelConfig.from_hf(CONFIG | {"intermediate_size": 100})
    assert planner.activation_bytes(model, 10, 2) == 10 * 2 * (2 * 32 + 3 * 100)


def test_logits_exist_a_tile_at_a_time() -> None:
    result = plan(2**34, max_num_seqs=4096, max_num_batched_tokens=4096)
    assert result.logits_tile_rows == 64
    assert dict(result.ledger)["logits"] == 64 * 4 * (97 + 32)


def test_slots_are_as_many_as_a_step_has_tokens() -> None:
    assert plan(max_num_batched_tokens=5).num_slots == 5


def test_a_cpu_gets_512_mib_of_kv_by_default_but_at_least_one_sequence() -> None:
    assert plan(2**34, max_num_seqs=4096, max_num_batched_tokens=4096).num_blocks == 2**29 // 8192
    wide = [KVSpec(64, 256, torch.float32)] * 64  # 128 MiB a block
    result = plan_memory(
        MODEL, engine_config(Path("unused")), weight_bytes=0, kv_specs=wide, itemsize=4,
        memory=HostMemory(2**40),
    )  # fmt: skip
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
    assert "at most 112 would fit" in lines[0]
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
