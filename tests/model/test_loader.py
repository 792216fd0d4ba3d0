"""Loading: names, shapes and dtypes checked, dummy weights, memory that does not grow with size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from pyserve.checkpoint_files import INDEX_FILE, SINGLE_FILE
from pyserve.errors import CheckpointError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.layers.pooler import HEAD_NAME
from pyserve.model.loader import EMBEDDING_NAME, check_checkpoint, load_model
from pyserve.model.placement import Placement
from pyserve.model.schemes import Dense
from tests.model import oracle
from tests.model.driver import Driver
from tests.model.safetensors_files import entry

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    oracle.make_model("qwen2").save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Set tensors of the checkpoint, or take them out."""
    path = folder / SINGLE_FILE
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


def load_dummy(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(
        Path("nowhere"),
        config,
        Placement(dtype, CPU),
        load_format="dummy",
        seed=seed,
        progress=lambda done, total: None,
    )


def is_tied(decoder: Decoder) -> bool:
    """The head multiplies by the embedding's matrix, and nothing is loaded for it."""
    assert decoder.head is not None
    matrix = decoder.head.matrix
    assert isinstance(matrix, Dense)
    return matrix.weight is decoder.embedding.weight and HEAD_NAME not in decoder.destinations()


def test_shards_and_one_file_hold_the_same_model(tmp_path: Path) -> None:
    model = oracle.make_model("llama", attention_bias=True)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert (tmp_path / "many" / INDEX_FILE).exists()
    one, many = (oracle.load_ours(tmp_path / name).destinations() for name in ("one", "many"))
    assert one.keys() == many.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(one[name].view, parameter)
        assert torch.equal(many[name].view, parameter)


def test_float16_checkpoints_are_converted(tmp_path: Path) -> None:
    model = oracle.make_model("mistral").half()
    model.save_pretrained(tmp_path)
    assert ModelConfig.from_path(tmp_path).dtype == "float16"
    for dtype in (torch.float32, torch.bfloat16):
        destinations = oracle.load_ours(tmp_path, dtype).destinations()
        for name, parameter in model.named_parameters():
            assert torch.equal(destinations[name].view, parameter.to(dtype))


def test_progress_counts_the_bytes_of_the_checkpoint(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(
        folder,
        ModelConfig.from_path(folder),
        Placement(torch.bfloat16, CPU),
        load_format="safetensors",
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(tensor.nbytes for tensor in load_file(folder / SINGLE_FILE).values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_missing_tensors_are_named(folder: Path) -> None:
    change(folder, {"model.layers.1.self_attn.k_proj.bias": None, "model.norm.weight": None})
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(folder)
    assert "model.layers.1.self_attn.k_proj.bias, model.norm.weight" in str(refusal.value)


def test_left_over_tensors_are_named(folder: Path) -> None:
    extra: dict[str, torch.Tensor | None] = {
        f"model.layers.{layer}.self_attn.o_proj.bias": torch.ones(64) for layer in range(9)
    }
    change(folder, extra)
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(folder)
    message = str(refusal.value)
    assert "model.layers.0.self_attn.o_proj.bias" in message and "and 4 more" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
        ("layers.0.self_attn.rotary_emb.inv_freq", (1, 8)),
        ("model.model.rotary_emb.inv_freq", ()),
        ("model.rotary_emb.original_inv_freq", (8,)),
        ("model.layers.2.self_attn.rotary_emb.cos_cached", (1, 1, 256, 16)),
        ("model.layers.2.self_attn.rotary_emb.sin_cached", (256, 16)),
        ("model.layers.1.self_attn.bias", (1, 1, 256, 256)),
        ("model.layers.1.self_attn.masked_bias", ()),
        ("model.causal_mask", (256, 256)),
        ("model.position_ids", (1, 256)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=["float32", "bool"])
def test_derived_tensors_of_old_checkpoints_are_passed_over(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, folder: Path
) -> None:
    expected = oracle.load_ours(folder).destinations()
    change(folder, {name: torch.ones(shape, dtype=dtype)})
    loaded = oracle.load_ours(folder).destinations()
    assert all(torch.equal(loaded[name].view, expected[name].view) for name in expected)


def test_a_bias_that_is_no_mask_is_left_over(folder: Path) -> None:
    change(folder, {"model.layers.1.self_attn.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"does not have .*model\.layers\.1\.self_attn\.bias"):
        oracle.load_ours(folder)


def test_a_quantised_checkpoint_is_called_one(folder: Path) -> None:
    """As AutoGPTQ wrote them, with its settings in a file of its own."""
    name = "model.layers.0.mlp.up_proj"
    change(folder, {f"{name}.weight": None, f"{name}.qweight": torch.ones(8, 96)})
    with pytest.raises(
        CheckpointError, match=rf"lacks: {name}\.weight; .*qweight is of a quantised"
    ):
        oracle.load_ours(folder)
    change(folder, {f"{name}.weight": torch.ones(96, 64), f"{name}.qweight": None})
    change(folder, {f"{name}.weight_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"weight_scale is of a quantised matrix"):
        oracle.load_ours(folder)


def strip_once(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize(
    "rename",
    [strip_once, lambda name: f"model.{name}", lambda name: f"model.model.{name}"],
    ids=["missing", "doubled", "tripled"],
)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_the_prefix_may_be_missing_or_doubled(
    rename: Callable[[str], str], is_tied: bool, tmp_path: Path
) -> None:
    model = oracle.make_model("llama", tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    assert ("lm_head.weight" in tensors) is not is_tied
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / SINGLE_FILE)
    loaded = oracle.load_ours(tmp_path).destinations()
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name].view, parameter)


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    change(folder, {"norm.weight": torch.ones(64)})
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(folder)
    for word in ("model.norm.weight twice", "as norm.weight", "as model.norm.weight"):
        assert word in str(refusal.value)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    change(folder, {"model.layers.0.mlp.up_proj.weight": torch.ones(95, 64)})
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(folder)
    for word in (SINGLE_FILE, "model.layers.0.mlp.up_proj.weight", "[95, 64]", "[96, 64]"):
        assert word in str(refusal.value)


def test_a_dtype_that_is_no_float_is_named(folder: Path) -> None:
    change(folder, {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is I8, supported are .*BF16"):
        oracle.load_ours(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_tied_model_may_be_stored_under_its_heads_name(
    prefix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """safetensors' save_model keeps one name of a shared tensor: the first in the alphabet."""
    model = oracle.make_model("llama", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_model(model, str(tmp_path / SINGLE_FILE))
    tensors = load_file(tmp_path / SINGLE_FILE)
    assert "lm_head.weight" in tensors and EMBEDDING_NAME not in tensors
    change(tmp_path, {HEAD_NAME: None, f"{prefix}{HEAD_NAME}": tensors[HEAD_NAME]})
    decoder = oracle.load_ours(tmp_path, dtype)
    assert is_tied(decoder)
    assert torch.equal(decoder.embedding.weight, model.lm_head.weight.to(dtype))
    check_checkpoint(tmp_path, decoder.config)
    if dtype == torch.float32:
        prompt = list(range(20))
        theirs = oracle.their_logits(oracle.load_theirs(tmp_path, dtype), prompt, is_stepwise=False)
        torch.testing.assert_close(Driver(decoder).step({0: prompt}), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [HEAD_NAME, EMBEDDING_NAME])
def test_one_matrix_for_two_must_be_said_in_the_config(name: str, tmp_path: Path) -> None:
    """transformers makes the missing one up, at random."""
    oracle.make_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    change(tmp_path, {name: None})
    with pytest.raises(CheckpointError) as refusal:
        oracle.load_ours(tmp_path)
    for word in (f"lacks: {name}", "tie_word_embeddings"):
        assert word in str(refusal.value)
    config = ModelConfig.from_path(tmp_path)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        check_checkpoint(tmp_path, config)
    tied = oracle.load_ours(tmp_path, tie_word_embeddings=True)
    assert is_tied(tied)


def test_a_stored_head_must_be_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    oracle.make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    embedding = load_file(tmp_path / SINGLE_FILE)["model.embed_tokens.weight"].clone()
    change(tmp_path, {"lm_head.weight": embedding})
    assert is_tied(oracle.load_ours(tmp_path, torch.bfloat16))
    embedding[-1, -1] += 1
    for wrong in (embedding, embedding[:5].clone()):
        change(tmp_path, {"lm_head.weight": wrong})
        with pytest.raises(CheckpointError, match="tie_word_embeddings"):
            oracle.load_ours(tmp_path)


def test_a_truncated_file(folder: Path) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        oracle.load_ours(folder)


def test_dummy_weights_depend_on_the_seed_alone(folder: Path) -> None:
    config = ModelConfig.from_path(folder)
    first, same, other = (load_dummy(config, seed).destinations() for seed in (1, 1, 2))
    for name, destination in first.items():
        view = destination.view.float()
        assert torch.equal(view, same[name].view)
        assert not torch.equal(view, other[name].view)
        assert float(view.mean()) == pytest.approx(destination.dummy_mean, abs=0.02)
        assert float(view.std()) == pytest.approx(0.02, rel=0.5)
    assert first["model.norm.weight"].dummy_mean == 1.0
    names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1)
             for part in ("gate", "up")]  # fmt: skip
    starts = {tuple(first[name].view.flatten()[:4].tolist()) for name in names}
    assert len(starts) == 4, "no two tensors hold the same"


def test_dummy_models_run(folder: Path) -> None:
    config = msgspec.structs.replace(ModelConfig.from_path(folder), vocab_size=70_000)
    decoder = load_dummy(config, dtype=torch.bfloat16)
    logits = Driver(decoder).step({0: [1, 69_999, 3]})
    assert bool(logits.isfinite().all())
    assert float(logits[0].float().std()) > 0.01
    # No two tokens share an embedding, though the noise is shorter than the matrix.
    assert len(decoder.embedding.weight.float().unique(dim=0)) == 70_000


PEAK_SCRIPT = """
import pathlib, re, sys, torch
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import Placement
from pyserve.model.loader import EMBEDDING_NAME, HEAD_NAME, check_checkpoint, load_model
folder, dtype = pathlib.Path(sys.argv[1]), getattr(torch, sys.argv[2])

def status_bytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = status_bytes("VmRSS")
decoder = load_model(
    folder, ModelConfig.from_path(folder), Placement(dtype, torch.device("cpu")),
    load_format="auto", seed=0, progress=lambda done, total: None,
)
weights = sum(destination.nbytes for destination in decoder.destinations().values())
print(weights, status_bytes("VmHWM") - before - weights)
"""


def test_loading_takes_little_memory_beside_the_weights(tmp_path: Path) -> None:
    """A 300 MB checkpoint of zeros (a sparse file), converted on the way."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 37_000,
        "hidden_size": 2048,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = build_model(ModelConfig.from_hf(config), Placement(torch.float32, CPU))
    header, end = {}, 0
    for name, destination in decoder.destinations().items():
        shape, begin = list(destination.view.shape), end
        end = begin + destination.view.nbytes
        header[name] = entry("F32", shape, begin, end)
    assert end > 300e6
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    out = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path), "bfloat16"],
        capture_output=True,
        text=True,
        check=True,
    )
    weights, extra = map(int, out.stdout.split())
    assert weights == end // 2
    assert extra < 100e6
