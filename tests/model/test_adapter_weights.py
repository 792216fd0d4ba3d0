"""Reading adapters of PEFT: what is kept, and what is refused by name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyserve.errors import CheckpointError
from pyserve.model.adapter_config import AdapterConfig
from pyserve.model.adapter_weights import AdapterWeights, Target, plain_module, read_adapter
from tests.model import peft
from tests.model.peft import CONFIG_FILE, PREFIX, WEIGHTS_FILE, write_adapter

SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 24),
    "model.layers.0.mlp.down_proj": (24, 48),
    "model.layers.1.self_attn.q_proj": (32, 24),
}
TARGETS = {name: Target(*shape) for name, shape in SHAPES.items()}


def read(folder: Path, *, max_rank: int = 64, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    return read_adapter(folder, TARGETS, max_rank=max_rank, dtype=dtype)


def change(folder: Path, act: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    act(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [PREFIX, "", f"{PREFIX}language_model."])
@pytest.mark.parametrize("suffix", ["weight", "default.weight"])
def test_what_is_read(tmp_path: Path, dtype: torch.dtype, prefix: str, suffix: str) -> None:
    write_adapter(tmp_path, SHAPES, rank=8, alpha=24, prefix=prefix, suffix=suffix)
    weights = read(tmp_path, dtype=dtype)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert weights.pairs.keys() == SHAPES.keys() and weights.largest == 8
    assert weights.base_model == "org/base" and not weights.unknown
    num_bytes = 0
    for name, pair in weights.pairs.items():
        assert torch.equal(pair.a, stored[f"{prefix}{name}.lora_A.{suffix}"].to(dtype))
        assert torch.equal(pair.b, stored[f"{prefix}{name}.lora_B.{suffix}"].to(dtype))
        assert pair.scale == 3.0
        num_bytes += pair.a.nbytes + pair.b.nbytes
    assert weights.nbytes == num_bytes


def test_scales_and_ranks_of_single_modules(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 4, "down_proj": 16},
        "alpha_pattern": {r".*\.0\..*q_proj": 40, "q_proj": 2.5},
    }
    write_adapter(tmp_path / "plain", SHAPES, rank=8, alpha=24, **config)
    write_adapter(tmp_path / "rs", SHAPES, rank=8, alpha=24, use_rslora=True, **config)
    plain, rooted = read(tmp_path / "plain").pairs, read(tmp_path / "rs").pairs
    expected = {
        "model.layers.0.self_attn.q_proj": (8, 40),
        "model.layers.0.mlp.down_proj": (16, 24),
        "model.layers.1.self_attn.q_proj": (4, 2.5),
    }
    for name, (rank, alpha) in expected.items():
        assert len(plain[name].a) == plain[name].b.shape[1] == rank
        assert plain[name].scale == pytest.approx(alpha / rank)
        assert rooted[name].scale == pytest.approx(alpha / math.sqrt(rank))


def test_the_tensors_decide_which_modules_it_has(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES, only="down_proj", target_modules="all-linear")
    assert list(read(tmp_path).pairs) == ["model.layers.0.mlp.down_proj"]
    # Copies that PEFT makes of the base model's own embeddings are passed over.
    copied = {f"{PREFIX}lm_head.base_layer.weight": torch.ones(3, 3)}
    change(tmp_path, lambda tensors: tensors.update(copied))
    assert list(read(tmp_path).pairs) == ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True), ("modules_to_save", ["lm_head"]), ("lora_bias", True),
        ("fan_in_fan_out", True), ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [5]), ("target_parameters", ["experts"]),
        ("alora_invocation_tokens", [1]), ("use_qalora", True), ("arrow_config", {"a": 1}),
        ("bias", "all"), ("bias", "lora_only"), ("peft_type", "LOHA"), ("peft_type", None),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"), ("init_lora_weights", "tomorrow's"),
        ("r", 0), ("r", -1), ("r", 8.0), ("r", True), ("r", None), ("lora_alpha", None),
        ("lora_alpha", "16"), ("lora_alpha", float("nan")), ("use_rslora", "yes"),
        ("rank_pattern", [4]), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": None}), ("alpha_pattern", {"(.*)*x": 4}),
        ("alpha_pattern", {".*.*.*q_proj": 4}), ("alpha_pattern", {"a" * 501: 4}),
        ("alpha_pattern", {f".*{i}.*": 1 for i in range(50)}),
        ("alpha_pattern", {r"(\w|.)" * 30 + "x": 1}), ("alpha_pattern", {"q_proj": 10**400}),
        ("init_lora_weights", "lora_ga"), ("r", 10**400), ("lora_alpha", 10**400),
        ("lora_alpha", 1e300), ("lora_alpha", -1e39),
    ],
)  # fmt: skip
def test_fields_that_are_refused(tmp_path: Path, field: str, value: object) -> None:
    write_adapter(tmp_path, SHAPES)
    config = peft.config_of(8, 16, **{field: value})
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{CONFIG_FILE}: {field}"):
        read(tmp_path)


def test_a_rank_that_is_refused_is_told_its_limits(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(peft.config_of(2**31, 16)))
    with pytest.raises(CheckpointError, match=r"r must be an integer in \[1, 2147483647\], got"):
        read(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"use_dora": False},
        {"modules_to_save": None}, {"modules_to_save": []}, {"layers_to_transform": [0]},
        {"loftq_config": {}}, {"bias": None}, {"revision": "main"}, {"eva_config": {"rho": 2}},
    ],
)  # fmt: skip
def test_fields_that_ask_for_nothing_else(tmp_path: Path, more: dict[str, Any]) -> None:
    write_adapter(tmp_path, SHAPES, **more)
    assert read(tmp_path).pairs.keys() == SHAPES.keys()


def test_unknown_fields_are_told(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES, brand_new=3, other_new=None)
    assert read(tmp_path).unknown == ("brand_new",)


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{Q}.lora_magnitude_vector", (32,), "DoRA"),
        (f"{Q}.lora_B.bias", (32,), "a bias of its own"),
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", (8, 90), "adapter of the embedding"),
        (f"{PREFIX}model.lm_head.modules_to_save.weight", (9, 9), "module that is replaced"),
        (f"{PREFIX}model.embed_tokens.weight", (9, 9), "replaced as a whole"),
        (f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta", (1, 9), "embeddings of"),
        (f"{PREFIX}lm_head.lora_A.weight", (8, 24), "an adapter of lm_head"),
        (f"{PREFIX}model.layers.0.mlp.experts.3.up_proj.lora_A.weight", (8, 24), "of experts"),
        (f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight", (8, 24), "no such module"),
        (f"{PREFIX}model.layers.0.self_attn.o_proj.lora_A.weight", (8, 24), "no such module"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (8, 24), "are of one module"),
        (f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight", (8, 23), r"shape \[8, 23\]"),
        (f"{Q}.lora_A.weight", (4, 24), r"shape \[4, 24\].*rank 8"),
        (f"{Q}.lora_B.weight", (33, 8), r"shape \[33, 8\]"),
        (f"{Q}.lora_B.weight", (32, 4), r"shape \[32, 4\]"),
    ],
)
def test_tensors_that_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    write_adapter(tmp_path, SHAPES)
    change(tmp_path, lambda tensors: tensors.update({name: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_a_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES)
    change(tmp_path, lambda tensors: tensors.pop(f"{Q}.lora_B.weight"))
    with pytest.raises(CheckpointError, match="lacks lora_A or lora_B of model.layers.0.self_attn"):
        read(tmp_path)
    change(tmp_path, lambda tensors: tensors.clear())
    with pytest.raises(CheckpointError, match="holds no LoRA tensors"):
        read(tmp_path)


def test_numbers_that_cannot_be_computed_with(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES)
    change(tmp_path, lambda tensors: tensors[f"{Q}.lora_A.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="not finite"):
        read(tmp_path)
    change(tmp_path, lambda it: it.update({f"{Q}.lora_A.weight": torch.ones(8, 24).to(torch.int8)}))
    with pytest.raises(CheckpointError, match="is I8, supported are"):
        read(tmp_path)


def test_a_rank_above_the_limit(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES, rank=8, rank_pattern={"down_proj": 16})
    with pytest.raises(CheckpointError, match="rank 16, --max-lora-rank is 8"):
        read(tmp_path, max_rank=8)
    assert read(tmp_path, max_rank=16).largest == 16


def test_files_that_are_not_there_or_lie(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config.json: No such file"):
        read(tmp_path)
    write_adapter(tmp_path, SHAPES)
    path = tmp_path / WEIGHTS_FILE
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            read(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"and no {WEIGHTS_FILE}"):
        read(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin and no.*pickles are not read"):
        read(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        read(tmp_path)


def test_names_of_modules() -> None:
    for name in ("layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj",
                 "base_model.model.model.layers.0.mlp.up_proj",
                 "base_model.model.model.language_model.layers.0.mlp.up_proj",
                 "base_model.model.language_model.model.layers.0.mlp.up_proj"):  # fmt: skip
        assert plain_module(name) == "model.layers.0.mlp.up_proj"
    # However long a name is that a pattern runs on, it is no module's.
    assert plain_module("model." * 50 + "layers.0.mlp.up_proj") != "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("left_away", ["", PREFIX, f"{PREFIX}model."])
def test_patterns_mean_the_names_that_were_trained(tmp_path: Path, left_away: str) -> None:
    """Some tools leave away what PEFT puts before a module's name, but not in the patterns."""
    write_adapter(
        tmp_path, SHAPES, rank=8,
        alpha_pattern={"model.layers.0.self_attn.q_proj": 24, r"^model\.layers\.1\..*": 40},
    )  # fmt: skip
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    shortened = {name.removeprefix(left_away): tensor for name, tensor in tensors.items()}
    save_file(shortened, tmp_path / WEIGHTS_FILE)
    scales = [pair.scale for _, pair in sorted(read(tmp_path).pairs.items())]
    assert scales == [2, 3, 5], "down_proj, then q_proj of both layers"


def test_a_dot_of_a_name_is_any_character() -> None:
    """As PEFT's keys are expressions: the quick way says what re does."""
    module = "model.layers.0.self_attn.q_proj"
    for key in ("q.proj", "q_proj", "proj", "attn.q_proj", ".q_proj", "layers.0.self.attn.q.proj",
                module, f"x{module}", module.replace(".", "x"), "Q_proj", "......"):  # fmt: skip
        expected = 2 if re.match(rf"(.*\.)?({key})$", module) else 1
        assert AdapterConfig(1, 1, alpha_pattern={key: 2}).scale_of(module) == expected, key


def test_an_expression_takes_bounded_time() -> None:
    config = AdapterConfig(8, 16, alpha_pattern={".*a.*b": 1} | {f".*{i}.*b": 1 for i in range(15)})
    name = "model." + "a" * 200 + ".q_proj"
    assert [config.scale_of(name) for _ in range(20)] == [2.0] * 20
