"""Checkpoints of 4-bit integers: each format's integers, zero points and scales land where they
belong; the logits are those of the same numbers in float; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyserve.checkpoint_files import SINGLE_FILE
from pyserve.errors import CheckpointError, ConfigError
from pyserve.model.config import ModelConfig
from pyserve.model.destination import finish_loading
from pyserve.model.layers.linear import Linear, Output
from pyserve.model.loader import check_checkpoint, load_model
from pyserve.model.placement import META, Placement
from pyserve.model.quantization import AT_LOAD, Quantization
from pyserve.model.w4a16 import W4A16
from pyserve.model.weights import CheckpointReader, index_checkpoint
from pyserve.ops import w4a16
from tests.model import oracle, quantised
from tests.model.driver import Driver

CPU = torch.device("cpu")
TOKENS = list(range(3, 40))
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
STORAGES = {
    "awq-gemm": "awq-gemm", "awq-gemv": "awq-gemv", "gptq": "gptq", "gptq_v2": "gptq_v2",
    "symmetric": "pack-quantized", "asymmetric": "pack-quantized",
}  # fmt: skip
KINDS = list(STORAGES)


def quantization(kind: str, group_size: int) -> Quantization:
    return Quantization(
        method="awq", storage=STORAGES[kind], group_size=group_size,  # type: ignore[arg-type]
        has_zeros=kind != "symmetric",
    )  # fmt: skip


def load(linear: Linear, folder: Path, buffer_bytes: int = 6144) -> None:
    """A buffer that small cuts every tensor."""
    stored = index_checkpoint(folder)
    with CheckpointReader(buffer_bytes) as reader:
        for name, destination in linear.destinations().items():
            assert stored[name].shape == destination.shape, name
            assert destination.sink is not None
            assert sum(reader.feed(stored[name], destination.sink)) == stored[name].num_bytes
    finish_loading(linear.destinations().values())


def numbers(linear: Linear) -> torch.Tensor:
    assert isinstance(linear.matrix, W4A16)
    plain = w4a16.dequantised(linear.matrix.packed, linear.out_features, linear.in_features)
    assert torch.equal(linear.matrix.plain(), plain)
    return plain


def place(kind: str, group_size: int, rank: int = 0, size: int = 1) -> Placement:
    return Placement(
        torch.float32, CPU, quantization=quantization(kind, group_size), tp_rank=rank, tp_size=size
    )


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_every_integer_is_where_it_belongs(kind: str, group_size: int, tmp_path: Path) -> None:
    """Of matrices that are fused, whose parts do not fill strips, on one rank and on two."""
    made = quantised.formats(group_size)[kind]
    sizes, k = {"q": 48, "k": 24, "v": 24}, 256
    matrices = {
        name: quantised.random_matrix(n, k, group_size, 1.0, made.zeros, seed=n + len(name))
        for name, n in sizes.items()
    }
    tensors = {
        f"{name}.{key}": tensor
        for name, matrix in matrices.items()
        for key, tensor in made.tensors(matrix).items()
    }
    save_file(tensors, tmp_path / SINGLE_FILE)
    plain = {name: matrix.plain() for name, matrix in matrices.items()}
    outputs = [Output(name, n // 8, 8) for name, n in sizes.items()]
    whole = Linear(outputs, k, place(kind, group_size), shard="column")
    load(whole, tmp_path)
    assert torch.equal(numbers(whole), torch.cat(list(plain.values())))
    for rank in range(2):
        if group_size == 128 or kind != "gptq":  # one of each: the rest is the same code
            halves = [Output(name, 2, n // 2) for name, n in sizes.items()]
            column = Linear(halves, k, place(kind, group_size, rank, 2), shard="column")
            load(column, tmp_path)
            expected = [matrix.chunk(2)[rank] for matrix in plain.values()]
            assert torch.equal(numbers(column), torch.cat(expected))
        row = Linear([Output("q", 48)], k, place(kind, group_size, rank, 2), shard="row")
        load(row, tmp_path)
        assert torch.equal(numbers(row), plain["q"].chunk(2, 1)[rank])


@pytest.mark.parametrize("kind", KINDS)
def test_one_integer_by_its_bits(kind: str, tmp_path: Path) -> None:
    """Basis vectors: one integer that differs is one number that differs, and no other."""
    n, k, group_size = 16, 128, 32
    made = quantised.formats(group_size)[kind]
    base = quantised.random_matrix(n, k, group_size, 1.0, made.zeros, seed=7)
    for row, column in [(0, 0), (1, 1), (2, 2), (5, 8), (9, 37), (15, 127), (6, 66), (12, 99)]:
        base.q[row, column] ^= 8
        save_file({f"q.{key}": value for key, value in made.tensors(base).items()},
                  tmp_path / SINGLE_FILE)  # fmt: skip
        linear = Linear([Output("q", n)], k, place(kind, group_size))
        load(linear, tmp_path)
        before = quantised.Matrix(base.q.copy(), base.z, base.s)
        before.q[row, column] ^= 8
        changed = (numbers(linear) != before.plain()).nonzero()
        assert changed.tolist() == [[row, column]]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_numbers(kind: str, family: str, tmp_path: Path) -> None:
    model = quantised.save(tmp_path, quantised.formats(32)[kind], 32, family)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    decoder = oracle.load_ours(tmp_path)
    assert isinstance(decoder.layers[0].linears[0].matrix, W4A16)
    logits = Driver(decoder).step({0: TOKENS})
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    one_by_one = Driver(decoder)
    rows = torch.cat([one_by_one.step({0: [token]}) for token in TOKENS])
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("group_size", [64, 128])
def test_larger_groups(group_size: int, tmp_path: Path) -> None:
    model = quantised.save(tmp_path, quantised.formats(group_size)["awq-gemm"], group_size, **WIDE)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    logits = Driver(oracle.load_ours(tmp_path)).step({0: TOKENS})
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def skips(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"] |= changes
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("awq-gemm", {"modules_to_not_convert": ["layers.1.mlp", "lm_head"]}),
        ("symmetric", {"ignore": ["lm_head", r"re:.*layers\.1\.mlp\..*"]}),
        (
            "symmetric",
            {
                "ignore": [
                    "lm_head",
                    *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
                ]
            },
        ),
    ],
)
def test_modules_that_are_left_plain(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = quantised.save(
        tmp_path, quantised.formats(32)[kind], 32, is_plain=lambda name: name.startswith("1.mlp")
    )
    skips(tmp_path, **changes)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    logits = Driver(oracle.load_ours(tmp_path)).step({0: TOKENS})
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_a_16_bit_checkpoint_is_rounded_as_it_is_loaded(tmp_path: Path) -> None:
    model = oracle.make_model("llama", **WIDE)
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_path(tmp_path).quantised_as("awq")
    assert config.quantization == AT_LOAD["awq"]
    decoder = load_model(
        tmp_path, config, Placement(torch.float32, CPU), load_format="auto", seed=0,
        progress=lambda done, total: None,
    )  # fmt: skip
    down = decoder.layers[1].mlp.linears[1]
    weight = model.model.layers[1].mlp.down_proj.weight.data
    assert down.matrix.packed.shape[2] == w4a16.unit_words(128)  # type: ignore[attr-defined]
    groups = weight.unflatten(1, (-1, 128))
    steps = (groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)) / 15
    error = (numbers(down) - weight).abs().unflatten(1, (-1, 128)).amax(2)
    assert bool((error <= 1.001 * steps).all()) and bool((error > 0.3 * steps).any())


def test_dummy_weights_are_random_integers(tmp_path: Path) -> None:
    quantised.save(tmp_path, quantised.formats(32)["awq-gemm"], 32)
    first, same, other = (
        load_model(
            tmp_path, ModelConfig.from_path(tmp_path), Placement(torch.float32, CPU),
            load_format="dummy", seed=seed, progress=lambda done, total: None,
        )
        for seed in (1, 1, 2)
    )  # fmt: skip
    matrices = [decoder.layers[2].mlp.linears[0] for decoder in (first, same, other)]
    one, again, another = (numbers(linear) for linear in matrices)
    assert torch.equal(one, again) and not torch.equal(one, another)
    assert float(one.std()) == pytest.approx(0.02, rel=0.1)
    assert float(Driver(first).step({0: TOKENS}).std()) > 0


def change(folder: Path, name: str, new: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change a tensor of the checkpoint, or take it out."""
    tensors = {key: value.clone() for key, value in load_file(folder / SINGLE_FILE).items()}
    value = tensors.pop(name)
    if new is not None:
        tensors[name] = new(value)
    save_file(tensors, folder / SINGLE_FILE)


UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"
BAD: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor] | None, list[str]]] = [
    ("awq-gemm", f"{UP}.qweight", lambda t: t[:-8], ["qweight has shape [56, 12]", "[64, 12]"]),
    (
        "awq-gemm",
        f"{UP}.scales",
        lambda t: t[:1].clone(),
        ["[1, 96]", "[2, 96] (4-bit awq in groups of 32)"],
    ),
    ("awq-gemm", f"{UP}.qzeros", None, [f"lacks: {UP}.qzeros"]),
    ("awq-gemv", f"{UP}.scales", None, [f"lacks: {UP}.scales"]),
    ("gptq", f"{DOWN}.qweight", lambda t: t.float(), ["qweight is F32", "supported are I32"]),
    ("gptq", f"{DOWN}.g_idx", lambda t: t.flip(0), [f"{DOWN}.g_idx", "act-order"]),
    ("gptq", f"{DOWN}.bias", lambda t: t + 1, [f"{DOWN}.bias", "not zero"]),
    ("asymmetric", f"{UP}.weight_zero_point", None, [f"lacks: {UP}.weight_zero_point"]),
    ("symmetric", f"{UP}.weight_shape", lambda t: t.flip(0), ["weight_shape says [64, 96]"]),
    ("symmetric", f"{UP}.weight_packed", lambda t: t[:, :4].clone(), ["[96, 4]", "[96, 8]"]),
]


@pytest.mark.parametrize(("kind", "name", "new", "words"), BAD)
def test_what_is_wrong_is_named(
    kind: str, name: str, new: Callable[[torch.Tensor], torch.Tensor] | None, words: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    quantised.save(tmp_path, quantised.formats(32)[kind], 32)
    change(tmp_path, name, new)
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(tmp_path)
    for word in words:
        assert word in str(refusal.value)


def test_a_plain_matrix_among_quantised_ones(tmp_path: Path) -> None:
    quantised.save(
        tmp_path, quantised.formats(32)["gptq"], 32, is_plain=lambda name: name == "1.mlp.down_proj"
    )
    with pytest.raises(CheckpointError) as refusal:
        check_checkpoint(tmp_path, ModelConfig.from_path(tmp_path))
    name = "model.layers.1.mlp.down_proj"
    for word in (f"lacks: {name}.qweight", f"{name}.weight is there, a plain matrix", "(gptq)"):
        assert word in str(refusal.value)


def test_a_quantised_matrix_among_plain_ones(tmp_path: Path) -> None:
    quantised.save(tmp_path, quantised.formats(32)["awq-gemm"], 32)
    skips(tmp_path, modules_to_not_convert=["layers.1.mlp.down_proj"])
    with pytest.raises(CheckpointError, match=r"lacks: model\.layers\.1\.mlp\.down_proj\.weight"):
        oracle.load_ours(tmp_path)


def test_half_of_a_fused_matrix(tmp_path: Path) -> None:
    quantised.save(tmp_path, quantised.formats(32)["awq-gemm"], 32)
    skips(tmp_path, modules_to_not_convert=["layers.1.self_attn.k_proj"])
    names = "q_proj and model.layers.1.self_attn.k_proj"
    with pytest.raises(ConfigError, match=f"{names}, whose matrices lie together"):
        oracle.load_ours(tmp_path)


def test_columns_that_groups_do_not_divide(tmp_path: Path) -> None:
    quantised.save(tmp_path, quantised.formats(32)["awq-gemm"], 32)
    skips(tmp_path, group_size=128)
    with pytest.raises(ConfigError, match=r"q_proj has 64 columns, .* the group size, 128"):
        oracle.load_ours(tmp_path)


def test_the_bytes_are_those_that_are_held() -> None:
    place_there = Placement(torch.float16, META, quantization=quantization("awq-gemm", 128))
    outputs = [Output("gate", 40), Output("up", 40)]
    linear = Linear(outputs, 256, place_there)
    places = linear.destinations().values()
    assert sum(place.nbytes for place in places) == linear.matrix.nbytes == 5 * 2 * 1088
    assert sum(place.num_params for place in places) == linear.num_params == 80 * 256
    assert place_there.scratch.num_bytes == 80 * 256 * 2
