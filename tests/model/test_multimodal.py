"""The text model of checkpoints that have more: found under both generations of names, alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from pyserve.checkpoint_files import SINGLE_FILE
from pyserve.errors import CheckpointError
from tests.model import oracle
from tests.model.driver import Driver

PROMPT = list(range(3, 40))
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT = oracle.TINY | {"num_hidden_layers": 2}
MODELS: dict[str, tuple[type[Any], type[PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        Gemma3Config, Gemma3ForConditionalGeneration,
        {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 9},
        {"mm_tokens_per_image": 1, "vision_config": TOWER | {"model_type": "siglip_vision_model"}},
    ),
    "mistral-small": (
        Mistral3Config, Mistral3ForConditionalGeneration,
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"tie_word_embeddings": False, "vision_config": TOWER | {"model_type": "pixtral"}},
    ),
    "ministral3": (
        Mistral3Config, Mistral3ForConditionalGeneration,
        {"model_type": "ministral3", "head_dim": 32},
        {"vision_config": TOWER | {"model_type": "pixtral"}},
    ),
}  # fmt: skip


def make(name: str, folder: Path, *, is_new: bool = False) -> PreTrainedModel:
    config_class, model_class, text, rest = MODELS[name]
    torch.manual_seed(0)
    config = config_class(text_config=TEXT | text, initializer_range=0.15, **rest)
    model = model_class(config).eval()
    model.save_pretrained(folder, save_original_format=not is_new)
    return model


@pytest.mark.parametrize("is_new", [False, True], ids=["old names", "new names"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits(
    name: str, is_new: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(name, tmp_path, is_new=is_new)
    prefixes = {tensor.split(".")[0] for tensor in load_file(tmp_path / SINGLE_FILE)}
    assert ("vision_tower" in prefixes) is not is_new
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    with caplog.at_level(logging.INFO, "pyserve"):
        decoder = oracle.load_ours(tmp_path)
    assert oracle.relative_error(Driver(decoder).step({0: PROMPT}), expected.double()) < 1e-5
    assert "without vision_tower and multi_modal_projector" in caplog.text


def test_what_is_neither_text_nor_a_tower_is_named(tmp_path: Path) -> None:
    make("mistral-small", tmp_path)
    path = tmp_path / SINGLE_FILE
    tensors = load_file(path)
    save_file({**tensors, "audio_tower.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="does not have with this config.json: audio_tower.w"):
        oracle.load_ours(tmp_path)
    vision = {key: value for key, value in tensors.items() if not key.startswith("language_model")}
    save_file(vision, path)
    with pytest.raises(CheckpointError, match="the checkpoint lacks: lm_head.weight, model.embed"):
        oracle.load_ours(tmp_path)


def test_a_text_model_has_no_tower(tmp_path: Path) -> None:
    oracle.make_model("mistral").save_pretrained(tmp_path)
    assert "language_model" not in json.loads((tmp_path / "config.json").read_text())
    path = tmp_path / SINGLE_FILE
    save_file({**load_file(path), "vision_tower.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="vision_tower.weight"):
        oracle.load_ours(tmp_path)
