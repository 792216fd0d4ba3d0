"""Adapters as PEFT saves them, with made-up weights, and the mathematics of PEFT: a model whose
matrices are merged, W + scale * B A."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the matrices of a model's layers, by name."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def config_of(rank: int, alpha: float, **more: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj"],  # not what the file holds: the tensors decide
        "bias": "none",
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": "org/base",
        **more,
    }


def write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 8,
    alpha: float = 16,
    seed: int = 0,
    only: str = "",
    dtype: torch.dtype = torch.float32,
    prefix: str = PREFIX,
    suffix: str = "weight",
    size: float = 0.3,
    **config: Any,
) -> Path:
    """An adapter of the modules whose names match `only`."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = config_of(rank, alpha, **config)
    (folder / CONFIG_FILE).write_text(json.dumps(whole))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        if not re.search(only, name):
            continue
        own = first_match(config.get("rank_pattern") or {}, name, rank)
        a = torch.randn(own, in_features, generator=generator) / math.sqrt(in_features)
        b = torch.randn(out_features, own, generator=generator) * size / math.sqrt(own)
        tensors[f"{prefix}{name}.lora_A.{suffix}"] = a.to(dtype)
        tensors[f"{prefix}{name}.lora_B.{suffix}"] = b.to(dtype)
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def first_match(pattern: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def merged(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with the adapter, whose numbers are first rounded to `dtype`, in its matrices."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = load_file(folder / WEIGHTS_FILE)
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        name = key.removeprefix(PREFIX).partition(".lora_A.")[0]
        rank = first_match(config.get("rank_pattern") or {}, name, config["r"])
        alpha = first_match(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            a, b = (side.to(dtype).double() for side in (a, b))
            weight.copy_((weight.double() + scale * (b @ a)).to(weight.dtype))
    return model
