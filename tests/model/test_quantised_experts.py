"""Mixtures whose experts are 4-bit integers or 8-bit floats: the logits are those of the same
numbers in float; experts that are stored otherwise than their mates are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyserve.checkpoint_files import SINGLE_FILE
from pyserve.errors import CheckpointError
from pyserve.model.config import ModelConfig
from pyserve.model.expert_schemes import QuantisedExperts
from pyserve.model.loader import check_checkpoint
from tests.model import oracle, quantised_files
from tests.model.driver import Driver
from tests.model.quantised_files import FP8, integers
from tests.model.test_fp8 import change, configure

TOKENS = list(range(3, 40))
QWEN3: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16,
    "norm_topk_prob": True,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2 = {key: value for key, value in QWEN3.items() if key != "head_dim"}
QWEN2["shared_expert_intermediate_size"] = 96
CASES = {
    "awq mixtral": (integers("awq-gemm", 32), "mixtral", MIXTRAL),
    "gptq mixtral": (integers("gptq", 32), "mixtral", MIXTRAL),
    "awq qwen3-moe": (integers("awq-gemm", 32), "qwen3_moe", QWEN3),
    "packed qwen3-moe": (integers("symmetric", 32), "qwen3_moe", QWEN3),
    "gptq qwen2-moe": (integers("gptq", 32), "qwen2_moe", QWEN2),
    "fp8 blocks qwen3-moe": (FP8["block"], "qwen3_moe", QWEN3 | {"moe_intermediate_size": 192}),
    "fp8 static mixtral": (FP8["static"], "mixtral", MIXTRAL),
    "fp8 rows qwen2-moe": (FP8["channel"], "qwen2_moe", QWEN2),
    "fp8 blocks deepseek-v3": (FP8["block"], "deepseek_v3", oracle.CASES["deepseek-v3"].changes),
}
SKIPPED = {
    "awq": {"modules_to_not_convert": ["mlp.gate", "block_sparse_moe.gate", "shared_expert_gate"]},
    "compressed-tensors": {"ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]},
}


def save(folder: Path, name: str) -> quantised_files.Saved:
    kind, family, sizes = CASES[name]
    saved = quantised_files.save(folder, kind, family, **sizes)
    configure(saved.folder, **SKIPPED.get(kind.config["quant_method"], {}))
    return saved


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_numbers(name: str, tmp_path: Path) -> None:
    """All at once, where experts have many rows, and one by one."""
    saved = save(tmp_path, name)
    expected = quantised_files.expected_logits(saved, TOKENS)
    decoder = oracle.load_ours(saved.folder)
    mixture = decoder.mixtures()[1]
    assert isinstance(mixture.gate_up, QuantisedExperts)
    assert isinstance(mixture.down, QuantisedExperts)
    logits = Driver(decoder).step({0: TOKENS})
    torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)
    one_by_one = Driver(decoder)
    rows = torch.cat([one_by_one.step({0: [token]}) for token in TOKENS])
    torch.testing.assert_close(rows, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["awq", "fp8"])
def test_plain_experts_are_rounded_as_they_are_loaded(method: str, tmp_path: Path) -> None:
    """Under the name of each, or all in one tensor, as transformers 5 may have them."""
    sizes = QWEN3 | {"moe_intermediate_size": 96}
    oracle.make_model("qwen3_moe", **sizes).save_pretrained(tmp_path)
    config = ModelConfig.from_path(tmp_path).quantised_as(method)  # type: ignore[arg-type]
    decoder = oracle.load_ours(tmp_path, quantization=config.quantization)
    logits = Driver(decoder).step({0: TOKENS})
    tensors = load_file(tmp_path / SINGLE_FILE)
    mixture = decoder.mixtures()[2]
    assert isinstance(mixture.down, QuantisedExperts)
    found = mixture.down.each[5].plain()
    weight = tensors["model.layers.2.mlp.experts.5.down_proj.weight"]
    assert 0.01 < oracle.relative_error(found, weight.double()) < (0.04 if method == "fp8" else 0.1)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = [
            [tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(8)]
            for name in ("gate", "up", "down")
        ]
        gate, up, down = (torch.stack(part) for part in parts)
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), 1)
        tensors[f"{prefix}.down_proj"] = down
    save_file(tensors, tmp_path / SINGLE_FILE)
    fused = oracle.load_ours(tmp_path, quantization=config.quantization)
    assert torch.equal(Driver(fused).step({0: TOKENS}), logits)
    for layer in range(3):
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            tensors[key] = tensors[key].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="gate_up_proj is laid out inputs by outputs"):
        oracle.load_ours(tmp_path, quantization=config.quantization)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, "fp8 blocks qwen3-moe").folder
    up = "model.layers.1.mlp.experts.5.up_proj"
    change(folder, f"{up}.weight_scale_inv", lambda scales: scales[:1].clone())
    with pytest.raises(CheckpointError, match=rf"{up}.weight_scale_inv has shape \[1, 1\]"):
        oracle.load_ours(folder)
    change(folder, f"{up}.weight_scale_inv", None)
    with pytest.raises(CheckpointError, match=f"lacks: {up}.weight_scale_inv"):
        check_checkpoint(folder, ModelConfig.from_path(folder))


def test_fused_experts_that_are_quantised_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, "fp8 blocks qwen3-moe").folder
    tensors = load_file(folder / SINGLE_FILE)
    prefix = "model.layers.1.mlp.experts"
    for name in [name for name in tensors if name.startswith(prefix)]:
        del tensors[name]
    tensors[f"{prefix}.gate_up_proj"] = torch.zeros(8, 384, 64, dtype=torch.float8_e4m3fn)
    tensors[f"{prefix}.down_proj"] = torch.zeros(8, 64, 192, dtype=torch.float8_e4m3fn)
    tensors[f"{prefix}.gate_up_proj_scale_inv"] = torch.ones(8, 3, 1)
    tensors[f"{prefix}.down_proj_scale_inv"] = torch.ones(8, 1, 2)
    save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="experts.gate_up_proj"):
        oracle.load_ours(folder)
