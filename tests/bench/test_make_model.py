"""Made models are what `tokenizers` and transformers take them for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench.make_model import main, make_config, make_model, make_tokenizer, tensor_shapes
from bench.model_presets import PRESETS

SMALL = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
TEXT = "Hello world, quite ordinary text: 3.14\n\t naïve 日本語 🤖<|turn|>"


@pytest.mark.parametrize("vocab_size", [260, 261, 1024, 128256])
def test_tokenizer_has_the_asked_size_and_round_trips(vocab_size: int) -> None:
    tokenizer = make_tokenizer(vocab_size, has_bos=True)
    assert tokenizer.get_vocab_size() == vocab_size
    ids = tokenizer.encode(TEXT).ids
    assert ids[0] == tokenizer.token_to_id("<|begin|>") == vocab_size - 4
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == TEXT
    assert max(ids) < vocab_size
    if vocab_size > 100_000:
        assert len(tokenizer.encode(" hello").ids) < 5 + 1 + 1  # merges are used


def test_tokenizer_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 260"):
        make_tokenizer(259, has_bos=True)
    with pytest.raises(ValueError, match="beyond"):
        make_tokenizer(2_000_000, has_bos=True)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_read_by_transformers(preset: str, tmp_path: Path) -> None:
    config = make_model(tmp_path, preset, {}, has_weights=False)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads"):
        assert getattr(loaded, name) == config[name]
    assert (
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
        == (config["vocab_size"])
    )


def test_parameter_counts_are_those_of_the_real_models() -> None:
    counts = {}
    for preset in PRESETS.keys() - {"tiny", "llama-3-8b"}:
        shapes = tensor_shapes(make_config(preset, {}))
        counts[preset] = sum(torch.Size(shape).numel() for _, shape in shapes)
    assert counts == {
        "llama-3.1-8b": 8_030_261_248,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-8b": 8_190_735_360,
        "mixtral-8x7b": 46_702_792_704,
        "qwen3-30b-a3b": 30_532_122_624,
        "gemma-2-9b": 9_241_705_984,
        "phi-4": 14_659_507_200,
        "phi-3-mini": 3_821_079_552,
        "llama-3.2-3b": 3_212_749_824,
        "llama-3.3-70b": 70_553_706_496,
        "deepseek-r1-distill-llama-70b": 70_553_706_496,
        "deepseek-r1-distill-qwen-32b": 32_763_876_352,
        "deepseek-v2-lite": 15_706_484_224,
        "deepseek-v3": 671_026_419_200,
        "glm-4.7-flash": 29_943_393_920,
    }


@pytest.mark.parametrize(
    "preset",
    [
        "llama-3-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "mixtral-8x7b", "qwen3-30b-a3b",
        "gemma-2-9b", "phi-4", "deepseek-v2-lite", "deepseek-v3", "glm-4.7-flash",
    ],
)  # fmt: skip
def test_weights_are_complete(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing as many as for a large model takes a second each; test_command_line does it once.
    monkeypatch.setattr("bench.make_model.POOL_VALUES", 2**16)
    overrides = {**SMALL, "head_dim": 8, "tie_word_embeddings": preset == "qwen3-8b"}
    if preset == "qwen3-30b-a3b":
        overrides |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if "kv_lora_rank" in PRESETS[preset]:
        overrides |= {"num_key_value_heads": overrides["num_attention_heads"]}
        overrides |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        overrides |= {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "first_k_dense_replace": 1}
        del overrides["head_dim"]
    make_model(tmp_path, preset, overrides, has_weights=True, shard_bytes=30_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    weight = model.model.layers[0].self_attn.o_proj.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    norm = torch.full((32,), 0.0 if preset.startswith("gemma") else 1.0, dtype=torch.bfloat16)
    assert torch.equal(model.model.norm.weight, norm)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "made"
    flags = ["--set", "num_hidden_layers=1", "--set", "rope_scaling=null", "--weights"]
    assert main(["tiny", str(folder), *flags]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] is None
    assert (folder / "model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|turn|>user\nhi<|endturn|>\n<|turn|>assistant\n"
    with pytest.raises(SystemExit):
        main(["tiny", str(folder), "--set", "vocab_size=10"])
    assert "at least 260" in capsys.readouterr().err
