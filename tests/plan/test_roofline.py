"""Floors against numbers worked out by hand, those of Llama-3.1-8B on an H200 among them."""

from __future__ import annotations

import pytest
import torch

from bench.model_presets import PRESETS
from pyserve.errors import ConfigError
from pyserve.model.config import ModelConfig
from pyserve.model.sharing import tp_sizes
from pyserve.plan.cards import Card, find_card
from pyserve.plan.roofline import decode_floor, measure_model, prefill_floor_s
from tests.engine.tiny import CONFIG

LLAMA = ModelConfig.from_hf(PRESETS["llama-3.1-8b"])
MIXTRAL = ModelConfig.from_hf(PRESETS["mixtral-8x7b"])
H200 = find_card("H200")
# Of a layer: q and o, k and v, gate, up and down.
LAYER_PARAMS = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
HEAD_PARAMS = 128256 * 4096
EVEN = Card("even", 1024, 1.0, 1.0, 1, (8, 0), source="made up")  # a byte a FLOP


def test_sizes_of_an_8b_llama() -> None:
    sizes = measure_model(LLAMA, torch.bfloat16)
    assert sizes.layer_params == 32 * LAYER_PARAMS
    assert sizes.head_params == HEAD_PARAMS
    norms = (2 * 32 + 1) * 4096
    assert sizes.num_params == 32 * LAYER_PARAMS + 2 * HEAD_PARAMS + norms
    assert sizes.weight_bytes == 2 * sizes.num_params
    assert sizes.kv_bytes_per_token == 128 * 1024


def test_a_tied_head_is_held_once_and_read() -> None:
    sizes = measure_model(ModelConfig.from_hf(CONFIG | {"tie_word_embeddings": True}), torch.half)
    assert sizes.head_params == 97 * 32
    assert sizes.num_params == sizes.layer_params + 97 * 32 + 5 * 32


def test_int4_is_4_25_bits_a_weight_of_the_layers_only() -> None:
    """Integers, and 32 bits of scale and zero point for each 128."""
    sizes = measure_model(LLAMA.quantised_as("awq"), torch.float16)
    assert sizes.layer_bytes == 32 * LAYER_PARAMS * 4.25 / 8
    assert sizes.num_params == measure_model(LLAMA, torch.float16).num_params
    assert sizes.head_bytes == 2 * HEAD_PARAMS
    assert sizes.weight_bytes / 1e9 == pytest.approx(5.81, abs=0.005)  # an AWQ file has 5.73
    floor = decode_floor(sizes, H200, batch=1, context_len=0)
    assert floor.seconds * 1e3 == pytest.approx(1.13, abs=0.01)


def test_fp8_is_8_bits_a_weight_of_the_layers_and_a_scale_for_128_by_128() -> None:
    raw = PRESETS["llama-3.1-8b"]
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    sizes = measure_model(ModelConfig.from_hf(raw | {"quantization_config": stored}), torch.half)
    assert sizes.layer_bytes == 32 * LAYER_PARAMS * (1 + 4 / 128**2)
    assert sizes.num_params == measure_model(LLAMA, torch.float16).num_params
    rows = 6144 + 4096 + 28672 + 4096
    of_rows = measure_model(LLAMA.quantised_as("fp8"), torch.half)
    assert of_rows.layer_bytes == 32 * (LAYER_PARAMS + 4 * rows)
    wide = ModelConfig.from_hf(raw | {"quantization_config": stored, "intermediate_size": 1280})
    assert tp_sizes(wide) == [1, 2], "blocks are not cut"
    assert wide.lacking_on_cuda() == []


def test_experts_of_4_bits_are_read_in_part() -> None:
    sizes = measure_model(MIXTRAL.quantised_as("awq"), torch.bfloat16)
    plain = measure_model(MIXTRAL, torch.bfloat16)
    assert sizes.num_params == plain.num_params
    assert sizes.mixtures[0].bytes_each == 3 * 14336 * 4096 * 4.25 / 8
    assert sizes.read_bytes(1) < 0.3 * plain.read_bytes(1)
    assert MIXTRAL.quantised_as("awq").lacking_on_cuda() == []


def test_a_mixture_is_held_whole_and_read_in_part() -> None:
    sizes = measure_model(MIXTRAL, torch.bfloat16)
    expert = 3 * 14336 * 4096
    attention, router = 2 * 4096 * 4096 + 2 * 1024 * 4096, 8 * 4096
    assert sizes.num_params == 46_702_792_704
    assert sizes.num_params_of_a_token == sizes.num_params - 32 * 6 * expert
    assert sizes.weight_bytes == 2 * sizes.num_params
    assert sizes.layer_params == 32 * (attention + router)
    assert sizes.layer_params_of_a_token == sizes.layer_params + 32 * 2 * expert
    always = sizes.layer_bytes + sizes.head_bytes
    assert sizes.read_bytes(1) == pytest.approx(always + 2 * 32 * 2 * expert)
    # Of 8 tokens, each with a quarter of the experts, 1 - (3/4)^8 of them have any.
    assert sizes.read_bytes(8) == pytest.approx(always + 2 * 32 * 8 * (1 - 0.75**8) * expert)
    assert sizes.read_bytes(2048) == pytest.approx(always + 2 * 32 * 8 * expert)
    floor = decode_floor(sizes, H200, batch=1, context_len=0)
    assert floor.seconds * 1e3 == pytest.approx(6.07, abs=0.05) and floor.bound == "bandwidth"
    half = measure_model(MIXTRAL, torch.bfloat16, tp_size=2)
    assert half.num_params_of_a_token == sizes.num_params_of_a_token
    assert half.layer_params_of_a_token < 0.51 * sizes.layer_params_of_a_token


def test_widths_of_experts_must_be_shared_too() -> None:
    raw = PRESETS["mixtral-8x7b"] | {"intermediate_size": 14338}
    assert tp_sizes(ModelConfig.from_hf(raw)) == [1, 2]
    with pytest.raises(ConfigError, match="an intermediate size of 14338 can be shared by 1, 2"):
        measure_model(ModelConfig.from_hf(raw), torch.bfloat16, tp_size=4)


@pytest.mark.parametrize(
    ("batch", "context_len", "milliseconds", "bound"),
    [
        (1, 0, 3.57, "bandwidth"),
        (64, 384, 4.34, "bandwidth"),  # 3.2 GB of KV cache
        (256, 384, 8.3, "FLOP"),  # 5.2 ms of matrix products, 3.1 ms of KV cache
    ],
)
def test_floors_of_the_h200(batch: int, context_len: int, milliseconds: float, bound: str) -> None:
    sizes = measure_model(LLAMA, torch.bfloat16)
    floor = decode_floor(sizes, H200, batch=batch, context_len=context_len)
    assert floor.seconds * 1e3 == pytest.approx(milliseconds, rel=0.01)
    assert floor.bound == bound


def test_prefill_of_8192_on_the_h200() -> None:
    assert prefill_floor_s(measure_model(LLAMA, torch.bfloat16), H200, 8192) == pytest.approx(
        0.180, abs=0.001
    )


def test_a_short_prompt_waits_for_the_weights() -> None:
    sizes = measure_model(LLAMA, torch.bfloat16)
    read_s = 2 * (32 * LAYER_PARAMS + HEAD_PARAMS) / 4.2e12
    assert prefill_floor_s(sizes, H200, 16) == pytest.approx(read_s)


def test_a_window_bounds_what_is_read_and_computed() -> None:
    whole = {**CONFIG, "architectures": ["MistralForCausalLM"], "sliding_window": None}
    full = measure_model(ModelConfig.from_hf(whole), torch.half)
    windowed = measure_model(ModelConfig.from_hf(whole | {"sliding_window": 16}), torch.half)
    per_token = 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, head_dim, bytes
    assert full.kv_bytes(200) == 200 * per_token and windowed.kv_bytes(200) == 16 * per_token
    assert windowed.kv_bytes(5) == full.kv_bytes(5) == 5 * per_token
    linear = 2 * (full.layer_params * 200 + full.head_params)
    pairs = 2 * 4 * 4 * 16  # layers, QK and PV, heads, head_dim
    assert prefill_floor_s(full, EVEN, 200) * 1e12 == pytest.approx(linear + pairs * 200 * 201 / 2)
    assert prefill_floor_s(windowed, EVEN, 200) * 1e12 == pytest.approx(
        linear + pairs * (16 * 17 / 2 + 184 * 16)
    )


def test_cards_share_whole_groups() -> None:
    model = ModelConfig.from_hf(CONFIG | {"hidden_size": 256, "intermediate_size": 256,
                                          "num_attention_heads": 8, "num_key_value_heads": 8,
                                          "head_dim": 32})  # fmt: skip
    assert tp_sizes(model) == [1, 2, 4, 8]
    assert tp_sizes(model.quantised_as("awq")) == [1, 2]
    with pytest.raises(ConfigError, match="can be shared by 1, 2 cards"):
        measure_model(model.quantised_as("awq"), torch.half, tp_size=4)
