"""As test_full_model.py, with weights of 8-bit floats: transformers has the numbers that they
stand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyserve.checkpoint_files import SINGLE_FILE
from pyserve.model.fp8 import Fp8
from pyserve.ops import fp8, quantised
from tests.gpu.test_full_model import SETTINGS, Checkpoint, assert_ratio, load_on_card
from tests.gpu.test_run_ahead import assert_replays
from tests.model import quantised_files
from tests.model.oracle import CASES, make_model
from tests.model.quantised_files import FP8

LLAMA: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 192}
LATENT = CASES["deepseek-v3"].changes | {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
# How the matrices are stored: as a kind of FP8, or plain ones that are rounded as they are loaded.
ROUNDED = "rounded"
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "blocks": ("block", "llama", LLAMA),
    "rows": ("channel", "llama", LLAMA | {"head_dim": 128, "attention_bias": True}),
    "static": ("static", "qwen3", LLAMA),
    "rounded": (ROUNDED, "llama", LLAMA),
    "blocks-mixtral": ("block", "mixtral", LLAMA | {"num_local_experts": 4}),
    "rows-qwen3-moe": ("channel", "qwen3_moe", CASES["qwen3-moe"].changes
                       | {"head_dim": 64, "moe_intermediate_size": 192}),
    "blocks-deepseek-v3": ("block", "deepseek_v3", LATENT),
}  # fmt: skip
WITHOUT_EXPERTS = ("blocks", "rows", "static", "rounded")
DTYPES = [torch.bfloat16, torch.float16]
NEVER = 2**62  # rows from which activations are rounded
ROUNDS = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="other cards have no kernel for it",
)


@contextmanager
def rounding_from(num_rows: int) -> Iterator[None]:
    weight = torch.zeros(128, 128, dtype=torch.uint8, device="cuda")
    torch.ops.pyserve.try_linear_w8a8(weight, num_rows)
    quantised._served.clear()
    try:
        yield
    finally:
        torch.ops.pyserve.try_linear_w8a8(weight, -1)
        quantised._served.clear()


@pytest.fixture(autouse=True)
def keeping_activations() -> Iterator[None]:
    """As errors are held against those of 16 bits."""
    with rounding_from(NEVER):
        yield


@pytest.fixture(scope="module", params=MODELS)
def checkpoints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Checkpoint]:
    kind, family, changes = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    if kind == ROUNDED:
        return [rounded(folder, family, changes, dtype) for dtype in DTYPES]
    saved = quantised_files.save(folder, FP8[kind], family, 0.08, **changes)
    return [Checkpoint(load_on_card(saved.folder, dtype), saved.plain) for dtype in DTYPES]


def rounded(folder: Path, family: str, changes: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    """`-q fp8` of a plain checkpoint; transformers gets its matrices rounded."""
    ours, theirs = folder / f"{dtype}", folder / f"{dtype} rounded"
    model = make_model(family, **changes)
    for path in (ours, theirs):
        model.save_pretrained(path)
    tensors = load_file(theirs / SINGLE_FILE)
    for name, tensor in tensors.items():
        if name.startswith("model.layers.") and tensor.dim() == 2:
            weight, scales = fp8.quantised(tensor)
            tensors[name] = weight.float() * scales[:, None]
    save_file(tensors, theirs / SINGLE_FILE)
    return Checkpoint(load_on_card(ours, dtype, method="fp8"), theirs)


def test_the_matrices_are_of_8_bits(checkpoints: list[Checkpoint]) -> None:
    assert {layer.schemes[0] for layer in checkpoints[0].ours.layers} == {Fp8}


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_of_bfloat16(settings: str, checkpoints: list[Checkpoint]) -> None:
    assert_ratio(checkpoints[0], settings)


def test_logits_of_float16(checkpoints: list[Checkpoint]) -> None:
    assert_ratio(checkpoints[1], "all")


def test_replays_and_running_ahead_give_the_same_tokens(checkpoints: list[Checkpoint]) -> None:
    assert_replays(checkpoints[0].ours)


@ROUNDS
@pytest.mark.parametrize("checkpoints", WITHOUT_EXPERTS, indirect=True)
def test_logits_where_activations_are_rounded(checkpoints: list[Checkpoint]) -> None:
    """Close: by the twin on a CPU models like these are 0.09 to 0.17 off. With experts the numbers
    say little, as they are others."""
    with rounding_from(1):
        assert_ratio(checkpoints[0], "all", allowed=0.35)


@ROUNDS
def test_replays_where_activations_are_rounded(checkpoints: list[Checkpoint]) -> None:
    """In every step, but where a norm is a factor of the sums."""
    with rounding_from(1):
        assert quantised.first_rounded_row(torch.device("cuda")) == 1
        assert_replays(checkpoints[0].ours)
