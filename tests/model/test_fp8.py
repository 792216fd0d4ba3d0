"""Checkpoints of 8-bit floats: numbers and scales land where they belong; the logits are those of
the same numbers in float; what is wrong is named."""

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
from pyserve.model.fp8 import Fp8
from pyserve.model.layers.linear import Linear, Output
from pyserve.model.loader import load_model
from pyserve.model.placement import META, Placement
from pyserve.model.quantization import AT_LOAD, Quantization
from pyserve.model.weights import CheckpointReader, index_checkpoint
from pyserve.ops import quantised, reference
from tests.model import oracle, quantised_files
from tests.model.driver import Driver
from tests.model.quantised_files import FP8, MINISTRAL3

CPU = torch.device("cpu")
TOKENS = list(range(3, 40))
KINDS = list(FP8)
GRANULARITIES = {
    "block": "block", "static": "tensor", "channel": "channel", "tensor": "tensor",
    "compressed block": "block",
}  # fmt: skip


def quantization(kind: str) -> Quantization:
    raw = {"architectures": ["LlamaForCausalLM"], **oracle.TINY, "rms_norm_eps": 1e-6}
    made = ModelConfig.from_hf(raw | {"quantization_config": FP8[kind].config}).quantization
    assert made is not None and made.granularity == GRANULARITIES[kind]
    return made


def place(kind: str, rank: int = 0, size: int = 1) -> Placement:
    return Placement(
        torch.float32, CPU, quantization=quantization(kind), tp_rank=rank, tp_size=size
    )


def load(linear: Linear, folder: Path) -> torch.Tensor:
    """Through a buffer that cuts every tensor; returns the numbers that the scheme holds."""
    stored = index_checkpoint(folder)
    with CheckpointReader(6144) as reader:
        for name, destination in linear.destinations().items():
            assert destination.fits(stored[name].shape), name
            assert stored[name].dtype in destination.dtypes
            for part in destination.parts:
                list(reader.copy(stored[name], part))
            if destination.sink is not None:
                list(reader.feed(stored[name], destination.sink))
    return linear.matrix.plain()


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_where_it_belongs(kind: str, tmp_path: Path) -> None:
    """Of fused matrices, some of whose parts do not fill blocks, on one rank and on two."""
    sizes, k = {"q": 256, "k": 96, "v": 96}, 512
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for seed, (name, n) in enumerate(sizes.items()):
        parts, plain[name] = FP8[kind].make(n, k, seed, 1.0)
        tensors |= {f"{name}.{end}": part.clone() for end, part in parts.items()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    outputs = [Output(name, 2, n // 2) for name, n in sizes.items()]
    whole = Linear(outputs, k, place(kind), shard="column")
    assert torch.equal(load(whole, tmp_path), torch.cat(list(plain.values())))
    x = torch.eye(k)[:40]
    out = torch.empty(40, whole.out_features)
    whole(x, out)
    assert torch.equal(out, torch.cat(list(plain.values()))[:, :40].T), "basis vectors"
    for rank in range(2):
        column = Linear(outputs, k, place(kind, rank, 2), shard="column")
        expected = torch.cat([matrix.chunk(2)[rank] for matrix in plain.values()])
        assert torch.equal(load(column, tmp_path), expected)
        row = Linear([Output("q", 256)], k, place(kind, rank, 2), shard="row")
        assert torch.equal(load(row, tmp_path), plain["q"].chunk(2, 1)[rank])


def test_blocks_are_not_cut_between_ranks() -> None:
    with pytest.raises(ConfigError, match="o: 4 ranks cannot share its 384 columns in blocks"):
        Linear([Output("o", 64)], 384, place("block", 0, 4), shard="row")
    Linear([Output("o", 64)], 384, place("channel", 0, 4), shard="row")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_numbers(kind: str, tmp_path: Path) -> None:
    """All at once, one by one; and greedy tokens."""
    saved = quantised_files.save(tmp_path, FP8[kind], intermediate_size=192)
    expected = quantised_files.expected_logits(saved, TOKENS)
    decoder = oracle.load_ours(saved.folder)
    assert decoder.layers[0].schemes == (Fp8,) * 4
    logits = Driver(decoder).step({0: TOKENS})
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    one_by_one = Driver(decoder)
    rows = torch.cat([one_by_one.step({0: [token]}) for token in TOKENS])
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-3)
    theirs = oracle.their_greedy(oracle.load_theirs(saved.plain, torch.float32), TOKENS, 24)
    ours, driver = [int(logits[-1].argmax())], Driver(decoder)
    driver.step({0: TOKENS})
    while len(ours) < len(theirs):
        ours.append(int(driver.step({0: ours[-1:]})[-1].argmax()))
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_logits_by_activations_that_are_rounded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a card with matrix units of 8 bits has them, by the twin: close, and not the same."""

    def multiply_rounded(
        self: quantised.Fp8Matrix, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        epilogue: int, scratch: torch.Tensor,
    ) -> bool:  # fmt: skip
        reference.linear_w8a8(x, *self, bias, out, scratch, epilogue)
        return True

    monkeypatch.setattr(quantised.Fp8Matrix, "is_own", lambda *_: False)
    monkeypatch.setattr(quantised.Fp8Matrix, "multiply_rounded", multiply_rounded)
    saved = quantised_files.save(tmp_path, FP8[kind], intermediate_size=192)
    logits = Driver(oracle.load_ours(saved.folder)).step({0: TOKENS})
    expected = quantised_files.expected_logits(saved, TOKENS)
    assert 0.01 < oracle.relative_error(logits, expected.double()) < 0.25


@pytest.mark.parametrize("kind", ["block", "channel"])
def test_latent_attention_has_the_numbers(kind: str, tmp_path: Path) -> None:
    """Of kv_b_proj too, which is split once it is loaded."""
    changes = oracle.CASES["deepseek-v3"].changes
    saved = quantised_files.save(tmp_path, FP8[kind], "deepseek_v3", **changes)
    decoder = oracle.load_ours(saved.folder)
    logits = Driver(decoder).step({0: TOKENS})
    expected = quantised_files.expected_logits(saved, TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    saved = quantised_files.save(tmp_path, FP8["block"])
    expected = quantised_files.expected_logits(saved, TOKENS)
    ours, plain = (
        Driver(oracle.load_ours(folder, torch.bfloat16)).step({0: TOKENS})
        for folder in (saved.folder, saved.plain)
    )
    limit = 2 * oracle.relative_error(plain, expected.double())
    assert oracle.relative_error(ours, expected.double()) <= limit


def test_transformers_has_other_names_for_the_scales_of_a_matrix(tmp_path: Path) -> None:
    saved = quantised_files.save(tmp_path, MINISTRAL3, "ministral3")
    expected = quantised_files.expected_logits(saved, TOKENS)
    logits = Driver(oracle.load_ours(saved.folder)).step({0: TOKENS})
    assert oracle.relative_error(logits, expected.double()) < 1e-5
    name = f"{UP}.weight_scale_inv"
    change(saved.folder, name, lambda t: t.repeat(2))
    words = rf"{name} has shape \[2\], config.json makes it \[1\] .*a scale a matrix"
    with pytest.raises(CheckpointError, match=words):
        oracle.load_ours(saved.folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("block", {"modules_to_not_convert": ["layers.1.mlp", "model.layers.0.mlp.gate"]}),
        ("static", {"ignored_layers": [r"re:.*layers\.1\.mlp\."]}),
        ("channel", {"ignore": ["lm_head", r"re:.*layers\.1\.mlp\..*"]}),
    ],
)  # fmt: skip
def test_modules_that_are_left_plain(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """The name of a router is not the beginning of that of a gate."""
    saved = quantised_files.save(tmp_path, FP8[kind], is_plain=lambda name: ".1.mlp." in name)
    configure(saved.folder, **changes)
    expected = quantised_files.expected_logits(saved, TOKENS)
    logits = Driver(oracle.load_ours(saved.folder)).step({0: TOKENS})
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"] |= changes
    path.write_text(json.dumps(raw))


def test_a_16_bit_checkpoint_is_rounded_as_it_is_loaded(tmp_path: Path) -> None:
    model = oracle.make_model("llama")
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_path(tmp_path).quantised_as("fp8")
    assert config.quantization == AT_LOAD["fp8"]
    decoder = oracle.load_ours(tmp_path, quantization=config.quantization)
    weight = model.model.layers[1].mlp.down_proj.weight.data
    found = decoder.layers[1].mlp.linears[1].matrix.plain()
    largest = weight.abs().amax(1, keepdim=True)
    error = (found - weight).abs()
    assert bool((error <= weight.abs() / 16 + largest / 448 / 64).all())
    assert bool((error.amax(1, keepdim=True) > largest / 100).any())
    place = Placement(torch.float32, CPU, quantization=AT_LOAD["fp8"], tp_rank=1, tp_size=2)
    linear = Linear([Output("model.layers.1.mlp.down_proj", 64)], 96, place, shard="row")
    columns = load(linear, tmp_path)
    assert torch.equal(columns, found[:, 48:]), "a rank's columns have the scale of the whole row"


def test_dummy_weights(tmp_path: Path) -> None:
    saved = quantised_files.save(tmp_path, FP8["block"])
    for config in (
        ModelConfig.from_path(saved.folder),
        ModelConfig.from_path(saved.plain).quantised_as("fp8"),
    ):
        decoder = load_model(
            saved.folder, config, Placement(torch.float32, CPU), load_format="dummy", seed=1,
            progress=lambda done, total: None,
        )  # fmt: skip
        for linear in decoder.layers[2].linears:
            assert float(linear.matrix.plain().std()) == pytest.approx(0.02, rel=0.1)
        assert float(Driver(decoder).step({0: TOKENS}).std()) > 0


def change(folder: Path, name: str, new: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Change a tensor of the checkpoint, or take it out."""
    tensors = {key: value.clone() for key, value in load_file(folder / SINGLE_FILE).items()}
    value = tensors.pop(name)
    if new is not None:
        tensors[name] = new(value)
    save_file(tensors, folder / SINGLE_FILE)


UP = "model.layers.1.mlp.up_proj"
OF_BLOCKS = "8-bit floats (fp8) with a scale for 128 by 128"
BAD: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor] | None, list[str]]] = [
    ("block", f"{UP}.weight_scale_inv", None, [f"lacks: {UP}.weight_scale_inv"]),
    (
        "block", f"{UP}.weight_scale_inv", lambda t: t.repeat(2, 1),
        ["[2, 1], config.json makes it [1, 1]", OF_BLOCKS],
    ),
    ("block", f"{UP}.weight_scale_inv", lambda t: t.int(), ["is I32, supported are F32, BF16"]),
    ("block", f"{UP}.weight", lambda t: t.float(), ["weight is F32, supported are F8_E4M3"]),
    ("block", f"{UP}.weight", lambda t: t[:90].clone(), ["[90, 64]", "[96, 64]", OF_BLOCKS]),
    ("channel", f"{UP}.weight_scale", lambda t: t[:1].clone(), ["[1, 1]", "[96, 1]", "a row"]),
    ("tensor", f"{UP}.weight_scale", lambda t: t.repeat(3), ["[3]", "[1]", "a scale a matrix"]),
    ("tensor", f"{UP}.input_scale", lambda t: t.repeat(2), ["[2]", "[1]"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "new", "words"), BAD)
def test_what_is_wrong_is_named(
    kind: str, name: str, new: Callable[[torch.Tensor], torch.Tensor] | None, words: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = quantised_files.save(tmp_path, FP8[kind]).folder
    change(folder, name, new)
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(folder)
    for word in words:
        assert word in str(refusal.value)


def test_a_plain_matrix_among_quantised_ones_and_the_other_way_round(tmp_path: Path) -> None:
    folder = quantised_files.save(tmp_path, FP8["block"], is_plain=lambda name: name == UP).folder
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(folder)
    for word in (f"lacks: {UP}.weight_scale_inv", f"{UP}.weight is there, a plain matrix", "(fp8)"):
        assert word in str(refusal.value)
    configure(folder, modules_to_not_convert=["mlp.down_proj", "mlp.up_proj"])
    with pytest.raises(ConfigError, match="gate_proj and .*up_proj, whose matrices lie together"):
        oracle.load_ours(folder)
    configure(folder, modules_to_not_convert=["mlp"])
    with pytest.raises(CheckpointError, match="is of a quantised matrix"):
        oracle.load_ours(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("block", {"fmt": "e5m2"}, 'fmt must be e4m3, got "e5m2"'),
        ("block", {"weight_block_size": [64, 128]}, r"weight_block_size must be \[128, 128\]"),
        ("block", {"scale_fmt": "other"}, "scale_fmt must be ue8m0"),
        ("block", {"activation_scheme": "none"}, "activation_scheme must be dynamic or static"),
        ("block", {"kv_cache_scheme": "static"}, "kv_cache_scheme is not supported"),
        ("block", {"modules_to_not_convert": ["re:((a+)+)+"]}, ".* too complicated"),
        ("channel", {"format": "int-quantized"}, "format must be pack-quantized or float-quant"),
    ],
)
def test_what_cannot_be_served_is_refused(
    kind: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    raw = {"architectures": ["LlamaForCausalLM"], **oracle.TINY, "rms_norm_eps": 1e-6}
    with pytest.raises(ConfigError, match=f"quantization_config: {words}"):
        ModelConfig.from_hf(raw | {"quantization_config": FP8[kind].config | changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strategy": "group"}, "strategy must be one of: block, channel, tensor"),
        ({"num_bits": 4}, "num_bits must be 8"),
        ({"type": "int"}, "type must be float"),
        ({"symmetric": False}, "symmetric must be true"),
    ],
)
def test_other_numbers_of_compressed_tensors_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    config = json.loads(json.dumps(FP8["channel"].config))
    config["config_groups"]["group_0"]["weights"] |= changes
    raw = {"architectures": ["LlamaForCausalLM"], **oracle.TINY, "rms_norm_eps": 1e-6}
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(raw | {"quantization_config": config})


def test_the_flag_agrees_with_the_checkpoint(tmp_path: Path) -> None:
    raw = {"architectures": ["LlamaForCausalLM"], **oracle.TINY, "rms_norm_eps": 1e-6}
    stored = ModelConfig.from_hf(raw | {"quantization_config": FP8["block"].config})
    assert stored.quantised_as("fp8") == stored.quantised_as(None) == stored
    with pytest.raises(ConfigError, match="--quantization awq: .* the checkpoint is fp8"):
        stored.quantised_as("awq")
    packed = ModelConfig.from_hf(raw | {"quantization_config": FP8["channel"].config})
    with pytest.raises(ConfigError, match="--quantization fp8: .* is compressed-tensors"):
        packed.quantised_as("fp8")


def test_what_a_server_says_once() -> None:
    (said,) = quantization("block").remarks()
    assert said.endswith("16-bit activations, which are not rounded to 8 bits")
    (said,) = quantization("static").remarks()
    assert said.endswith(": the checkpoint's input_scale is not used")
    assert len(AT_LOAD["fp8"].remarks()) == 2
    (said,) = quantization("block").remarks(17)
    assert "by FP8 matrix units in steps of 17 rows and more, where activations are rounded" in said
    (said,) = quantization("static").remarks(17)
    assert said.endswith("they are not: the checkpoint's input_scale is not used")


def test_activations_of_a_checkpoint_of_8_bit_weights_alone_are_never_rounded() -> None:
    """Whatever a card has for those of others."""
    raw = {"architectures": ["LlamaForCausalLM"], **oracle.TINY, "rms_norm_eps": 1e-6}
    for has_activations in (True, False):
        config = json.loads(json.dumps(FP8["channel"].config))
        (group,) = config["config_groups"].values()
        group["input_activations"] = group["weights"] | {"dynamic": True}
        if not has_activations:
            del group["input_activations"]
        made = ModelConfig.from_hf(raw | {"quantization_config": config}).quantization
        assert made is not None
        there = Placement(torch.bfloat16, META, quantization=made)
        matrix = Linear([Output("o", 64)], 384, there).matrix
        assert isinstance(matrix, Fp8)
        assert (type(matrix.matrix) is quantised.Fp8Matrix) == has_activations
        assert isinstance(matrix.matrix.of_expert(0), type(matrix.matrix))
        (said,) = made.remarks(17)
        assert ("in steps of 17 rows and more" in said) == has_activations


def test_the_bytes_are_those_that_are_held() -> None:
    there = Placement(torch.bfloat16, META, quantization=quantization("block"))
    linear = Linear([Output("gate", 256), Output("up", 256)], 384, there)
    places = linear.destinations().values()
    assert sum(place.nbytes for place in places) == linear.matrix.nbytes == 512 * 384 + 4 * 3 * 4
    assert sum(place.num_params for place in places) == linear.num_params == 512 * 384
