"""A start is refused before a download for what it would be refused for after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyserve.checkpoint_files import LENGTH_BYTES, SINGLE_FILE
from pyserve.engine.load import check_start
from pyserve.errors import CheckpointError, PlanError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import Placement
from tests.engine.tiny import CONFIG, engine_config, write_model


def write_headers(folder: Path, *, without: str | None = None) -> Path:
    """A model's folder as it is before the download: the weights' file has no data."""
    write_model(folder)
    config = ModelConfig.from_hf(CONFIG)
    shapes = build_model(config, Placement(torch.float32, torch.device("cpu")), max_model_len=1)
    tensors = {
        name: torch.zeros(place.view.shape)
        for name, place in shapes.destinations().items()
        if name != without
    }
    path = folder / SINGLE_FILE
    save_file(tensors, path)
    text = path.read_bytes()
    path.write_bytes(text[: LENGTH_BYTES + int.from_bytes(text[:LENGTH_BYTES], "little")])
    os.truncate(path, len(text))
    return folder


def test_headers_are_enough(tmp_path: Path) -> None:
    start = check_start(engine_config(write_headers(tmp_path), load_format="auto"))
    assert start.plan.max_model_len == 256 and start.dtype == torch.float32


def test_what_does_not_fit_is_refused_with_the_ledger(tmp_path: Path) -> None:
    config = engine_config(
        write_headers(tmp_path), load_format="auto", max_model_len=256, kv_cache_memory_bytes=1000
    )
    with pytest.raises(PlanError, match="a context of 256 tokens does not fit(.|\n)* weights "):
        check_start(config)


def test_tensors_are_held_against_the_config(tmp_path: Path) -> None:
    write_headers(tmp_path, without="model.norm.weight")
    with pytest.raises(CheckpointError, match="lacks: model.norm.weight"):
        check_start(engine_config(tmp_path, load_format="auto"))
    assert check_start(engine_config(tmp_path, load_format="dummy")).plan.num_blocks > 0


def test_a_plan_leaves_torch_s_symbols_alone() -> None:
    """Of the meta device: what torch has written in Python there imports sympy, 480 modules."""
    program = (
        "import sys; from pyserve.config import DEMO_MODEL, EngineConfig; "
        "from pyserve.engine.load import settle_start; "
        "settle_start(EngineConfig(model_path=DEMO_MODEL, device='cpu')); "
        "assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
