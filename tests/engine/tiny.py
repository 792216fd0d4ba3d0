"""A tiny Llama with made-up weights, in float32, served by the real runner."""

from __future__ import annotations

import json
from pathlib import Path

from pyserve.config import EngineConfig

VOCAB_SIZE = 97
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_model(folder: Path, **overrides: object) -> Path:
    """A folder with nothing but config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | overrides))
    return folder


def engine_config(folder: Path, **overrides: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model_path": folder,
        "device": "cpu",
        "load_format": "dummy",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "allow_reference_ops": True,
    }
    return EngineConfig(**(settings | overrides))  # type: ignore[arg-type]
