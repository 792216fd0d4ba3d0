"""Quantised checkpoints of a tiny model, written integer by integer by the words of each format,
and the same model with the numbers that they stand for.

The layouts are those of the libraries that write them (facts, no code of theirs):
AutoAWQ gemm: awq/modules/linear/gemm.py, `order_map` [0, 2, 4, 6, 1, 3, 5, 7]: the integer at place
i of a word is column order_map[i] of its 8; zero points as they are.
AutoAWQ gemv: awq/modules/linear/gemv.py, in order, and `calculate_zeros_width` for qzeros, scales.
AutoGPTQ: auto_gptq/nn_modules/qlinear/qlinear_tritonv2.py, `pack`: rows of qweight are 8 columns of
the matrix in order, `zeros -= 1` before qzeros are packed; "gptq_v2" leaves that out (GPTQModel,
gptqmodel/utils/model.py, convert_gptq_v2_to_v1_format_module).
compressed-tensors: src/compressed_tensors/compressors/pack_quantized.py: signed integers plus 8, in
order along the columns; zero points likewise along the rows (`packed_dim=0`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pyserve.checkpoint_files import SINGLE_FILE
from tests.model import oracle

Ints = NDArray[np.int64]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))


@dataclass(frozen=True)
class Matrix:
    """q [n, k] and z [n, groups] of 0..15, s [n, groups] of float16."""

    q: Ints
    z: Ints
    s: Tensor

    @property
    def group_size(self) -> int:
        return int(self.q.shape[1] // self.z.shape[1])

    def plain(self) -> Tensor:
        """float32 [n, k]"""
        size = self.group_size
        differences = torch.from_numpy(self.q - self.z.repeat(size, 1)).float()
        return differences * self.s.float().repeat_interleave(size, 1)


@dataclass(frozen=True)
class Format:
    """What config.json says, which zero points there are, and the tensors of a matrix."""

    config: dict[str, Any]
    tensors: Callable[[Matrix], dict[str, Tensor]]
    zeros: tuple[int, int] = (0, 16)
    extra: dict[str, Any] = field(default_factory=dict)


def packed(values: Ints, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """int32 [rows, columns / 8] of [rows, columns]; place i of a word is column order[i]."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint64)
    for i, column in enumerate(order):
        words |= values[:, column::8].astype(np.uint64) << np.uint64(4 * i)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def awq_gemm(matrix: Matrix) -> dict[str, Tensor]:
    return {
        "qweight": packed(matrix.q.T, AWQ_ORDER),
        "qzeros": packed(matrix.z.T, AWQ_ORDER),
        "scales": matrix.s.T.contiguous(),
    }


def awq_gemv(matrix: Matrix) -> dict[str, Tensor]:
    groups = matrix.z.shape[1]
    multiple = {128: 1, 64: 2, 32: 4}[matrix.group_size]
    width = 8 * multiple * -(-groups // (8 * multiple))
    zeros = np.pad(matrix.z, ((0, 0), (0, width - groups)))
    scales = torch.nn.functional.pad(matrix.s, (0, width - groups))
    return {"qweight": packed(matrix.q), "qzeros": packed(zeros), "scales": scales}


def gptq(matrix: Matrix, less: int = 1) -> dict[str, Tensor]:
    columns = np.arange(matrix.q.shape[1])
    return {
        "qweight": packed(matrix.q).T.contiguous(),
        "qzeros": packed(matrix.z.T - less & 15),
        "scales": matrix.s.T.contiguous(),
        "g_idx": torch.from_numpy(columns // matrix.group_size).int(),
        "bias": torch.zeros(len(matrix.q), dtype=torch.float16),
    }


def gptq_v2(matrix: Matrix) -> dict[str, Tensor]:
    return gptq(matrix, less=0)


def symmetric(matrix: Matrix) -> dict[str, Tensor]:
    return {
        "weight_packed": packed(matrix.q),
        "weight_scale": matrix.s.bfloat16(),
        "weight_shape": torch.tensor(matrix.q.shape),
    }


def asymmetric(matrix: Matrix) -> dict[str, Tensor]:
    return symmetric(matrix) | {"weight_zero_point": packed(matrix.z.T).T.contiguous()}


def _compressed(group_size: int, *, is_symmetric: bool) -> dict[str, Any]:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": is_symmetric, "strategy": "group",
        "group_size": group_size, "actorder": None, "dynamic": False, "observer": "minmax",
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "sparsity_config": {}, "quantization_status": "compressed",
    }  # fmt: skip


def _awq(version: str, group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq", "version": version, "bits": 4, "group_size": group_size,
        "zero_point": True, "modules_to_not_convert": None,
    }  # fmt: skip


def _gptq(checkpoint_format: str, group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False,
        "sym": False, "checkpoint_format": checkpoint_format, "lm_head": False, "dynamic": {},
    }  # fmt: skip


def formats(group_size: int) -> dict[str, Format]:
    return {
        "awq-gemm": Format(_awq("gemm", group_size), awq_gemm),
        "awq-gemv": Format(_awq("gemv", group_size), awq_gemv),
        "gptq": Format(_gptq("gptq", group_size), gptq),
        "gptq_v2": Format(_gptq("gptq_v2", group_size), gptq_v2),
        "symmetric": Format(_compressed(group_size, is_symmetric=True), symmetric, (8, 9)),
        "asymmetric": Format(_compressed(group_size, is_symmetric=False), asymmetric),
    }


def random_matrix(
    n: int, k: int, group_size: int, std: float, zeros: tuple[int, int], seed: int
) -> Matrix:
    """Of numbers that scatter by about `std`; scales that bfloat16 holds."""
    random = np.random.default_rng(seed)
    shape = n, k // group_size
    scales = torch.from_numpy(random.uniform(0.5, 1.5, shape) * std / 5)
    return Matrix(
        random.integers(0, 16, (n, k)), random.integers(*zeros, shape), scales.bfloat16().half()
    )


def save(
    folder: Path, made: Format, group_size: int, family: str = "llama", std: float = 0.15,
    is_plain: Callable[[str], bool] = lambda name: False, **changes: Any,
) -> PreTrainedModel:  # fmt: skip
    """Save a tiny model in that format; returns it with the numbers that are stored. Modules of
    layers are quantised, but those that `is_plain` names."""
    model = oracle.make_model(family, **changes)
    for seed, (name, module) in enumerate(sorted(model.model.layers.named_modules())):
        if isinstance(module, torch.nn.Linear) and not is_plain(name):
            matrix = random_matrix(
                module.out_features, module.in_features, group_size, std, made.zeros, seed
            )
            module.weight.data = matrix.plain()
            module.matrix = matrix  # type: ignore[assignment]
    model.save_pretrained(folder)
    tensors = load_file(folder / SINGLE_FILE)
    for name, module in model.model.layers.named_modules():
        kept = getattr(module, "matrix", None)
        if isinstance(kept, Matrix):
            prefix = f"model.layers.{name}"
            del tensors[f"{prefix}.weight"]
            stored = made.tensors(kept)
            tensors = {f"{prefix}.{kind}": tensor for kind, tensor in stored.items()} | tensors
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SINGLE_FILE)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": made.config}
    path.write_text(json.dumps(config))
    return model
