"""The same for copies of a model, another one for a model that was trained further."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyserve.config import DEMO_MODEL
from pyserve.errors import CheckpointError
from pyserve.model.fingerprint import fingerprint

FILES = ("config.json", "model.safetensors")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copyfile(DEMO_MODEL / name, tmp_path / name)
    return tmp_path


def test_a_copy_is_the_same_model(copy: Path) -> None:
    (copy / "consolidated.safetensors").write_bytes(b"what is not loaded")
    assert fingerprint(copy) == fingerprint(DEMO_MODEL)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.3.mlp.down_proj", "layers.7"])
def test_other_weights_are_another(copy: Path, part: str) -> None:
    tensors = load_file(copy / FILES[1])
    for name, tensor in tensors.items():
        if part in name:
            tensors[name] = tensor + torch.tensor(0.01, dtype=tensor.dtype)
    save_file(tensors, copy / FILES[1])
    assert fingerprint(copy) != fingerprint(DEMO_MODEL)
    without_weights = {fingerprint(it, has_weights=False) for it in (copy, DEMO_MODEL)}
    assert len(without_weights) == 1


def test_another_config_is_another(copy: Path) -> None:
    text = (copy / FILES[0]).read_text()
    (copy / FILES[0]).write_text(text.replace("10000.0", "20000.0"))
    assert fingerprint(copy) != fingerprint(DEMO_MODEL)
    (copy / FILES[1]).unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        fingerprint(copy)
