"""Checkpoints whose matrices are quantised one by one, of any family, and beside them the same
checkpoints with the numbers that they stand for: for transformers, and as plain ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyserve.checkpoint_files import SINGLE_FILE
from tests.model import oracle, quantised

# (rows, columns, seed, std) -> what is stored by the ends of names, and the numbers in float32.
Maker = Callable[[int, int, int, float], tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Kind:
    """What config.json says, and how a matrix is made."""

    config: dict[str, Any]
    make: Maker


@dataclass(frozen=True)
class Saved:
    folder: Path  # with the quantised matrices
    plain: Path


def save(
    folder: Path, kind: Kind, family: str = "llama", std: float = 0.15,
    is_plain: Callable[[str], bool] = lambda name: False, **changes: Any,
) -> Saved:  # fmt: skip
    """All matrices of the layers but those of routers, gates, and what `is_plain` names."""
    saved = Saved(folder / "quantised", folder / "plain")
    oracle.make_model(family, **changes).save_pretrained(saved.plain)
    plain = load_file(saved.plain / SINGLE_FILE)
    stored: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(sorted(plain.items())):
        module = name.removesuffix(".weight")
        is_matrix = name.startswith("model.layers.") and tensor.dim() == 2
        if not is_matrix or module.endswith("gate") or is_plain(module):
            stored[name] = tensor.clone()
            continue
        n, k = tensor.shape
        parts, numbers = kind.make(n, k, seed, std)
        made = {f"{module}.{end}": part.clone() for end, part in parts.items()}
        stored |= {key: part for key, part in made.items() if key == name or key not in plain}
        plain[name] = numbers
    saved.folder.mkdir()
    save_file(stored, saved.folder / SINGLE_FILE)
    save_file({name: tensor.clone() for name, tensor in plain.items()}, saved.plain / SINGLE_FILE)
    config = json.loads((saved.plain / "config.json").read_text())
    config["quantization_config"] = kind.config
    (saved.folder / "config.json").write_text(json.dumps(config))
    return saved


def expected_logits(saved: Saved, tokens: list[int]) -> Tensor:
    """By transformers, of the numbers."""
    model = oracle.load_theirs(saved.plain, torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


# ---- 4-bit integers -----------------------------------------------------------------------------


def integers(name: str, group_size: int) -> Kind:
    made = quantised.formats(group_size)[name]

    def make(n: int, k: int, seed: int, std: float) -> tuple[dict[str, Tensor], Tensor]:
        matrix = quantised.random_matrix(n, k, group_size, std, made.zeros, seed)
        return made.tensors(matrix), matrix.plain()

    return Kind(made.config, make)


# ---- 8-bit floats -------------------------------------------------------------------------------
# Facts of the formats: DeepSeek-V3's README_WEIGHTS.md; AutoFP8, auto_fp8/quantize.py (scales
# without dims); compressed-tensors, src/compressed_tensors/quantization/quant_args.py;
# transformers, integrations/finegrained_fp8.py.


def numbers(n: int, k: int, seed: int, rows: int, columns: int, std: float) -> tuple[Tensor, ...]:
    """e4m3 [n, k], a float32 scale for each rows by columns, and what they stand for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 64
    weight = weight.clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = -(-n // rows), -(-k // columns)
    scales = (torch.rand(shape, generator=generator) + 0.5) * std / 64
    whole = scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    return weight, scales, weight.float() * whole


def _of_blocks(scale_name: str) -> Maker:
    def make(n: int, k: int, seed: int, std: float) -> tuple[dict[str, Tensor], Tensor]:
        weight, scales, plain = numbers(n, k, seed, 128, 128, std)
        return {"weight": weight, scale_name: scales}, plain

    return make


def _of_rows(n: int, k: int, seed: int, std: float) -> tuple[dict[str, Tensor], Tensor]:
    weight, scales, _ = numbers(n, k, seed, 1, k, std)
    scales = scales.bfloat16()
    return {"weight": weight, "weight_scale": scales}, weight.float() * scales.float()


def _of_matrices(
    *shape: int, scale_name: str = "weight_scale", input_name: str = "input_scale"
) -> Maker:
    def make(n: int, k: int, seed: int, std: float) -> tuple[dict[str, Tensor], Tensor]:
        weight, scales, plain = numbers(n, k, seed, n, k, std)
        scale = scales.view(shape)
        return {"weight": weight, scale_name: scale, input_name: scale.clone()}, plain

    return make


def _compressed(strategy: str, *, is_dynamic: bool) -> dict[str, Any]:
    weights = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False,
        "block_structure": [128, 128] if strategy == "block" else None, "observer": "minmax",
    }  # fmt: skip
    activations = weights | {"strategy": "token", "dynamic": is_dynamic, "block_structure": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": None, "quantization_status": "compressed",
    }  # fmt: skip


BLOCK = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip
STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["re:.*lm_head"]}
MINISTRAL3 = Kind(  # as transformers writes a scale a matrix
    {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
        "dequantize": False, "modules_to_not_convert": ["model.vision_tower", "lm_head"],
    },
    _of_matrices(scale_name="weight_scale_inv", input_name="activation_scale"),
)  # fmt: skip
FP8 = {
    "block": Kind(BLOCK, _of_blocks("weight_scale_inv")),
    "static": Kind(STATIC, _of_matrices()),
    "channel": Kind(_compressed("channel", is_dynamic=True), _of_rows),
    "tensor": Kind(_compressed("tensor", is_dynamic=False), _of_matrices(1)),
    "compressed block": Kind(_compressed("block", is_dynamic=True), _of_blocks("weight_scale")),
}
