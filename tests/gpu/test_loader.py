"""Loading to a card: bits, speed and host memory; dummy weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pyserve.errors import CheckpointError
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.destination import Part
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.model.weights import BUFFER_BYTES, SLICE_BYTES, CheckpointReader, read_header

CARD = torch.device("cuda", 0)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def load_dummy(config: ModelConfig, seed: int) -> Decoder:
    return load_model(
        Path("nowhere"), config, Placement(torch.bfloat16, CARD), load_format="dummy", seed=seed,
        progress=lambda done, total: None,
    )  # fmt: skip


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_arrive_converted_whatever_the_pieces(stored: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "odd": torch.randn(977, 13).to(stored),
        "pieces": torch.randn(3, 10_001).to(stored),
        "scalar": torch.tensor(2.5, dtype=stored),
        "empty": torch.empty(0, 4, dtype=stored),
    }
    save_file(tensors, path)
    stored_tensors = {tensor.name: tensor for tensor in read_header(path)}
    for dtype in (torch.bfloat16, torch.float16):
        arrived = {
            name: torch.full(tensor.shape, torch.nan, dtype=dtype, device=CARD)
            for name, tensor in tensors.items()
        }
        with CheckpointReader(4096, device=CARD) as reader:
            for name, destination in arrived.items():
                num_bytes = sum(reader.copy(stored_tensors[name], Part(destination)))
                assert num_bytes == tensors[name].nbytes
        for name, tensor in tensors.items():
            assert torch.equal(arrived[name].cpu(), tensor.to(dtype)), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_matrix_arrive(dim: int, stored: torch.dtype, tmp_path: Path) -> None:
    """Slices along both dimensions, to rows that follow each other and to rows that do not."""
    path = tmp_path / "model.safetensors"
    tensor = torch.randn(977, 40).to(stored)
    save_file({"a": tensor}, path)
    wanted = tensor.narrow(dim, 7, 20)
    for wide in (wanted.shape[1], wanted.shape[1] + 8):
        shape = wanted.shape[0] + 2, wide
        whole = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=CARD)
        part = Part(whole[1:-1, : wanted.shape[1]], dim, 7)
        with CheckpointReader(4096, device=CARD) as reader:
            assert sum(reader.copy(read_header(path)[0], part))
            reader.wait()
        assert torch.equal(part.view.cpu(), wanted.to(torch.bfloat16))
        assert int(whole.isnan().sum()) == whole.numel() - wanted.numel()


def test_pieces_of_full_size_are_read_by_many_threads(tmp_path: Path) -> None:
    """Three buffers and a bit, into a slice of a larger matrix."""
    path = tmp_path / "model.safetensors"
    num_rows = 3 * BUFFER_BYTES // 4096 + 5
    tensor = torch.randn(num_rows, 2048, device=CARD).to(torch.bfloat16)
    assert tensor.nbytes > 3 * BUFFER_BYTES > 3 * SLICE_BYTES
    save_file({"a": tensor.cpu()}, path)
    fused = torch.full((num_rows + 20, 2048), torch.nan, dtype=torch.bfloat16, device=CARD)
    with CheckpointReader(device=CARD) as reader:
        for _ in reader.copy(read_header(path)[0], Part(fused[10:-10])):
            pass
        reader.wait()
        assert torch.equal(fused[10:-10], tensor)
    assert bool(fused[:10].isnan().all()) and bool(fused[-10:].isnan().all())


def test_the_buffers_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(CARD)
    for _ in range(3):
        with CheckpointReader(device=CARD) as reader:
            list(reader.copy(read_header(path)[0], Part(torch.empty(1000, device=CARD))))
            assert torch.cuda.memory_reserved(CARD) >= before + BUFFER_BYTES
    assert torch.cuda.memory_reserved(CARD) <= before + 2 * 2**20
    stored = read_header(path)[0]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="became shorter"):
        with CheckpointReader(device=CARD) as reader:
            list(reader.copy(stored, Part(torch.empty(1000, device=CARD))))
    assert torch.cuda.memory_reserved(CARD) <= before + 2 * 2**20


def test_dummy_weights_depend_on_the_seed_alone() -> None:
    config = ModelConfig.from_hf(SHAPE)
    first, same, other = (load_dummy(config, seed).destinations() for seed in (1, 1, 2))
    for name, destination in first.items():
        view = destination.view.float()
        assert torch.equal(view, same[name].view)
        assert not torch.equal(view, other[name].view)
        assert float(view.mean()) == pytest.approx(destination.dummy_mean, abs=0.01)
        assert float(view.std()) == pytest.approx(0.02, rel=0.3)
    assert first["model.norm.weight"].dummy_mean == 1.0
    assert len(first["model.embed_tokens.weight"].view.float().unique(dim=0)) == 1000


def test_dummy_weights_of_16_gb_take_seconds() -> None:
    if torch.cuda.mem_get_info(CARD)[0] < 20e9:
        pytest.skip("needs 20 GB of free memory on the card")
    llama = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    began_s = time.monotonic()
    decoder = load_dummy(ModelConfig.from_hf(SHAPE | llama), 0)
    took_s = time.monotonic() - began_s
    num_bytes = sum(place.nbytes for place in decoder.destinations().values())
    assert num_bytes > 16e9
    assert took_s < 3.0
    reserved = torch.cuda.max_memory_reserved(CARD)
    assert reserved < 1.1 * num_bytes
    del decoder
    torch.cuda.empty_cache()


BIG_TENSOR_SCRIPT = """
import json, pathlib, re, sys, threading, time, torch
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.placement import Placement
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model

folder, device = pathlib.Path(sys.argv[1]), torch.device("cuda", 0)
config = ModelConfig.from_path(folder)

def status_bytes(key):
    found = re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(found[1]) * 1024 if found else 0

# The checkpoint: random on the card, written through small pieces.
decoder = build_model(config, Placement(torch.bfloat16, device))
header, end = {}, 0
for name, place in decoder.destinations().items():
    place.view.normal_()
    begin, end = end, end + place.view.nbytes
    header[name] = {"dtype": "BF16", "shape": list(place.view.shape), "data_offsets": [begin, end]}
text = json.dumps(header).encode()
with open(folder / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for place in decoder.destinations().values():
        for piece in place.view.view(-1).split(2**23):
            file.write(piece.cpu().view(torch.uint8).numpy())

resident = status_bytes("VmRSS")
peak = {"RssAnon": 0, "VmRSS": 0}  # sampled: not every system begins VmHWM anew on demand
def watch():
    while not done.wait(0.002):
        for key in peak:
            peak[key] = max(peak[key], status_bytes(key))
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
began_s = time.monotonic()
loaded = load_model(
    folder, config, Placement(torch.bfloat16, device), load_format="auto", seed=0,
    progress=lambda done, total: None,
)
took_s = time.monotonic() - began_s
done.set()
watcher.join()
expected, arrived = decoder.destinations(), loaded.destinations()
print(json.dumps({
    "is_equal": all(torch.equal(arrived[name].view, expected[name].view) for name in expected),
    "largest_bytes": max(place.nbytes for place in expected.values()),
    "gb_per_s": end / 1e9 / took_s,
    "anonymous_bytes": peak["RssAnon"],
    "grown_bytes": peak["VmRSS"] - resident,
}))
"""


def test_a_single_tensor_of_3_gb(tmp_path: Path) -> None:
    if torch.cuda.mem_get_info(CARD)[0] < 8e9:
        pytest.skip("needs 8 GB of free memory on the card")
    config = SHAPE | {"vocab_size": 375_000, "hidden_size": 4096, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = subprocess.run(
        [sys.executable, "-c", BIG_TENSOR_SCRIPT, str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert found["is_equal"] and found["largest_bytes"] > 3e9
    assert found["anonymous_bytes"] < 1e9, found
    assert found["grown_bytes"] < 300e6, found
    assert found["gb_per_s"] >= 3.0, found
