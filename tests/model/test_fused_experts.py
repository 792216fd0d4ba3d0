"""Experts in a tensor each, or all in one, in either layout: the same model, or an error that says
what is there and what was expected."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyserve.checkpoint_files import SINGLE_FILE
from pyserve.errors import CheckpointError
from pyserve.model.config import ModelConfig
from pyserve.model.loader import check_checkpoint
from tests.model import oracle
from tests.model.driver import Driver

PROMPT = random.Random(4).choices(range(oracle.VOCAB_SIZE), k=30)
CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}  # fmt: skip
NUM_EXPERTS, HIDDEN = 3, 64
SIZE = {"mixtral": 96, "qwen3_moe": 24}
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


@pytest.fixture(scope="module", params=CHANGES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def made(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tensor an expert."""
    folder = tmp_path_factory.mktemp(family)
    oracle.make_model(family, **CHANGES[family]).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes((made / "config.json").read_bytes())
    return tmp_path


def fused(made: Path, family: str) -> dict[str, Tensor]:
    """The tensors of the checkpoint as transformers 5 has them in memory."""
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    tensors = load_file(made / SINGLE_FILE)
    tensors = {name.replace("block_sparse_moe", "mlp"): it for name, it in tensors.items()}
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        if f"{prefix}gate.weight" not in tensors:
            continue
        gate, up, down = (
            torch.stack(
                [tensors.pop(f"{prefix}experts.{i}.{name}.weight") for i in range(NUM_EXPERTS)]
            )
            for name in names
        )
        tensors[prefix + GATE_UP] = torch.cat((gate, up), 1)
        tensors[prefix + DOWN] = down
    return tensors


def transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.transpose(1, 2).contiguous() if name.endswith((GATE_UP, DOWN)) else tensor
        for name, tensor in tensors.items()
    }


def logits(folder: Path) -> Tensor:
    return Driver(oracle.load_ours(folder)).step({0: PROMPT})


def test_every_layout_holds_the_same_model(family: str, made: Path, folder: Path) -> None:
    names = load_file(made / SINGLE_FILE)
    each = "w1" if family == "mixtral" else "gate_proj"
    assert any(name.endswith(f"experts.0.{each}.weight") for name in names)
    expected = logits(made)
    tensors = fused(made, family)
    assert tensors[f"model.layers.0.mlp.{DOWN}"].shape == (NUM_EXPERTS, HIDDEN, SIZE[family])
    for stored in (tensors, transposed(tensors)):
        save_file(stored, folder / SINGLE_FILE)
        check_checkpoint(folder, ModelConfig.from_path(folder))
        assert torch.equal(logits(folder), expected)
    # Converted as it is read.
    save_file({name: it.half() for name, it in transposed(tensors).items()}, folder / SINGLE_FILE)
    assert oracle.relative_error(logits(folder), expected.double()) < 0.05


def test_what_transformers_writes_when_asked_for_it(family: str, made: Path, folder: Path) -> None:
    model = oracle.make_model(family, **CHANGES[family])
    model.save_pretrained(folder, save_original_format=False)
    assert any(name.endswith(GATE_UP) for name in load_file(folder / SINGLE_FILE))
    assert torch.equal(logits(folder), logits(made))


def refusal(folder: Path, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(folder, ModelConfig.from_path(folder))
    return str(error.value)


def test_other_shapes_are_named_with_what_was_expected(
    family: str, made: Path, folder: Path
) -> None:
    tensors, size = fused(made, family), SIZE[family]
    name = f"model.layers.2.mlp.{GATE_UP}"
    message = refusal(folder, tensors | {name: tensors[name][:2].contiguous()})
    assert f"{name} has shape [2, {2 * size}, 64], config.json makes it" in message
    assert f"[3, {2 * size}, 64] or [3, 64, {2 * size}]" in message
    name = f"model.layers.2.mlp.{DOWN}"
    message = refusal(folder, tensors | {name: tensors[name].transpose(1, 2).contiguous()})
    assert f"{name} has shape [3, {size}, 64], config.json makes it [3, 64, {size}]" in message
    assert "gate_up_proj is laid out" in message
    del tensors[name]
    assert "the checkpoint lacks: model.layers.2" in refusal(folder, tensors)


def test_a_layout_that_the_shape_does_not_tell_is_refused(tmp_path: Path) -> None:
    size = HIDDEN // 2
    changes = CHANGES["qwen3_moe"] | {"moe_intermediate_size": size}
    oracle.make_model("qwen3_moe", **changes).save_pretrained(tmp_path)
    expected = logits(tmp_path)  # a tensor an expert tells
    assert bool(expected.isfinite().all())
    message = refusal(tmp_path, fused(tmp_path, "qwen3_moe"))
    assert "gate_up_proj has shape [3, 64, 64], which may be" in message
    assert "[experts, 2 * 32, hidden_size] or [experts, hidden_size, 2 * 32]" in message


def test_missing_and_more_experts_are_named(family: str, made: Path, folder: Path) -> None:
    tensors = load_file(made / SINGLE_FILE)
    module = "block_sparse_moe" if family == "mixtral" else "mlp"
    prefix = f"model.layers.2.{module}.experts"
    fewer = {name: it for name, it in tensors.items() if not name.startswith(f"{prefix}.1.")}
    assert refusal(folder, fewer) == (
        f"{prefix}: config.json says 3 experts, the checkpoint holds 2; it lacks {prefix}.1"
    )
    more = {
        name.replace(f"{prefix}.1.", f"{prefix}.3."): it.clone()
        for name, it in tensors.items()
        if name.startswith(f"{prefix}.1.")
    }
    assert "the checkpoint holds 4; it also holds" in refusal(folder, tensors | more)
    one = next(name for name in tensors if name.startswith(f"{prefix}.2."))
    without = {name: it for name, it in tensors.items() if name != one}
    assert f"the checkpoint lacks: {one}" in refusal(folder, without)
    both = tensors | {f"model.layers.2.mlp.{part}": torch.zeros(1) for part in (GATE_UP, DOWN)}
    assert "the checkpoint holds experts twice" in refusal(folder, both)


def test_layers_that_predict_further_ahead_are_not_loaded(tmp_path: Path) -> None:
    changes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    oracle.make_model("glm4_moe", **changes).save_pretrained(tmp_path)
    expected = logits(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    more = {"model.layers.3.eh_proj.weight": torch.zeros(4, 4)}
    more |= {"model.layers.3.mlp.experts.7.up_proj.weight": torch.zeros(4, 4)}
    save_file(tensors | more, tmp_path / SINGLE_FILE)
    assert torch.equal(logits(tmp_path), expected)
    # Others are the model's own, of which config.json does not say enough.
    del more["model.layers.3.eh_proj.weight"]
    name = "model.layers.3.input_layernorm.weight"
    for extra in ({name: torch.zeros(64)}, more | {"model.layers.4.eh_proj.weight": torch.ones(1)}):
        message = refusal(tmp_path, tensors | extra)
        assert "does not have with this config.json: model.layers.3." in message


def test_a_router_of_another_shape_or_dtype_is_named(family: str, made: Path, folder: Path) -> None:
    tensors = load_file(made / SINGLE_FILE)
    name = next(name for name in tensors if name.endswith("gate.weight"))
    message = refusal(folder, tensors | {name: torch.zeros(4, HIDDEN)})
    assert f"{name} has shape [4, 64], config.json makes it [3, 64]" in message
    message = refusal(folder, tensors | {name: torch.zeros(3, HIDDEN, dtype=torch.int8)})
    assert f"{name} is I8, supported are F16, BF16, F32, F64" in message
