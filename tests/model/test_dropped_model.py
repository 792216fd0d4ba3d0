"""A model that nobody refers to any more is gone at once, without the garbage collector: a card
that sleeps has to have its memory back then, and what was frozen at the start is never looked at.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.model.config import ModelConfig
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from tests.machine import freeze
from tests.model.oracle import CASES, FAMILIES, TINY

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 97, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QUANTISED: dict[str, dict[str, Any]] = {
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "fp8": {"weight_block_size": [128, 128], "activation_scheme": "dynamic"},
}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    freeze()
    gc.disable()
    yield
    gc.enable()


def num_tensors() -> int:
    return sum(type(it) is torch.Tensor for it in gc.get_objects())


def check(config: ModelConfig, dtype: torch.dtype, folder: Path) -> None:
    before = num_tensors()
    model = load_model(
        folder, config, Placement(dtype, torch.device("cpu")), load_format="dummy", seed=0,
        progress=lambda done, total: None,
    )  # fmt: skip
    assert num_tensors() > before
    del model
    assert num_tensors() == before


@pytest.mark.parametrize("name", CASES)
def test_of_every_family(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config_class, model_class = FAMILIES[case.family]
    raw = config_class(**(TINY | case.changes)).to_dict()
    config = ModelConfig.from_hf(raw | {"architectures": [model_class.__name__]})
    gc.collect()  # what transformers has left, of what has come since
    check(config, torch.float32, tmp_path)


@pytest.mark.parametrize("method", QUANTISED)
def test_of_quantised_matrices(method: str, tmp_path: Path) -> None:
    raw = LLAMA | {"quantization_config": {"quant_method": method} | QUANTISED[method]}
    check(ModelConfig.from_hf(raw), torch.bfloat16, tmp_path)
