"""The safetensors reader: what it reads, and that no header can make it do anything else."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyserve.checkpoint_files import INDEX_FILE, MAX_HEADER_BYTES
from pyserve.errors import CheckpointError
from pyserve.model.destination import Part
from pyserve.model.weights import (
    CheckpointReader,
    bytes_to_read,
    index_checkpoint,
    read_header,
)
from tests.model.safetensors_files import entry, write, write_raw


def fill(path: Path, name: str, destination: torch.Tensor, *, buffer_bytes: int = 64) -> None:
    stored = {tensor.name: tensor for tensor in read_header(path)}[name]
    with CheckpointReader(buffer_bytes) as reader:
        assert sum(reader.copy(stored, Part(destination))) == stored.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["same", "converted"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_a_matrix_goes_to_any_view(dim: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Slices along both dimensions, to rows that follow each other and to rows that do not."""
    tensor = torch.randn(37, 50)
    save_file({"a": tensor, "b": torch.randn(3)}, tmp_path / "model.safetensors")
    stored = index_checkpoint(tmp_path)["a"]
    wanted = tensor.narrow(dim, 11, 20)
    for wide in (wanted.shape[1], wanted.shape[1] + 7):
        whole = torch.full((wanted.shape[0] + 2, wide), torch.nan, dtype=dtype)
        part = Part(whole[1:-1, : wanted.shape[1]], dim, 11)
        with CheckpointReader(1000) as reader:
            assert sum(reader.copy(stored, part)) == bytes_to_read(stored, part)
        assert bytes_to_read(stored, part) == (20 * 50 * 4 if dim == 0 else stored.num_bytes)
        assert torch.equal(part.view, wanted.to(dtype))
        assert int(whole.isnan().sum()) == whole.numel() - wanted.numel(), "nothing else is written"


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_arrive_converted_whatever_the_pieces(
    dtype: torch.dtype, to: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"b": torch.randn(13, 7).to(dtype), "a": torch.randn(3).to(dtype)}
    save_file(tensors, path, metadata={"format": "pt"})
    for name, tensor in tensors.items():
        destination = torch.empty(tensor.shape, dtype=to)
        fill(path, name, destination)
        assert torch.equal(destination, tensor.to(to))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, path)
    destination = torch.empty(())
    fill(path, "scalar", destination)
    assert destination == 2.5
    fill(path, "empty", torch.empty(0, 4))


F32 = {"a": entry("F32", [2, 2], 0, 16)}
BROKEN_HEADERS: dict[str, tuple[dict[str, Any], int]] = {
    # what is wrong: (header, bytes of data)
    "truncated": (F32, 12),
    "belong to no tensor": (F32, 17),
    "overlaps": (F32 | {"b": entry("F32", [2], 8, 16)}, 16),
    "gap": (F32 | {"b": entry("F32", [2], 20, 28)}, 28),
    "gap before": ({"a": entry("F32", [2], 8, 16)}, 16),
    "need 16 bytes": ({"a": entry("F32", [2, 2], 0, 12)}, 12),
    "need 0 bytes": ({"a": entry("F32", [0, 2], 0, 8)}, 8),
    "data_offsets must": ({"a": entry("F32", [2, 2], 16, 0)}, 16),
    "unknown dtype 'F33'": ({"a": entry("F33", [2, 2], 0, 16)}, 16),
    "shape must": ({"a": entry("F32", [-2, -2], 0, 16)}, 16),
    "shape must be": ({"a": entry("F32", [2**63, 2], 0, 16)}, 16),
    "at most 8": ({"a": entry("F32", [1] * 9, 0, 4)}, 4),
    "must be an object, got [1, 2]": ({"a": [1, 2]}, 0),
    "the tensor name 'a\\nb\\x1b' is not printable": ({"a\nb\x1b": entry("F32", [1], 0, 4)}, 4),
    "shape must be at most": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "must be [begin, end]": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "unknown dtype None": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    "unknown dtype": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4),
    "be [begin, end]": ({"a": entry("F32", [1], 0, True)}, 4),
    "data_offsets must be": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
        4,
    ),
    # The product overflows 64 bits to 16; ours does not.
    "need 73786976294838206464 bytes, data_offsets give 0": (
        {"a": entry("F32", [2**31, 2**31, 4], 0, 0)},
        0,
    ),
}


@pytest.mark.parametrize("what", BROKEN_HEADERS)
def test_lying_headers_are_refused(what: str, tmp_path: Path) -> None:
    header, num_bytes = BROKEN_HEADERS[what]
    path = write(tmp_path / "model.safetensors", header, b"\0" * num_bytes)
    with pytest.raises(CheckpointError) as refusal:
        read_header(path)
    assert what in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("header", "header_len"),
    [
        (b"", 2**64 - 1),
        (b"", 2**63),
        (b"{}", 3),
        (b"{}", MAX_HEADER_BYTES + 1),
        (b"[]", None),
        (b"", None),
        (b"{", None),
        (b'{"a": "\xff"}', None),
        (b'{"a":' * 50_000, None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_headers_that_are_none(header: bytes, header_len: int | None, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, b"", header_len=header_len)
    with pytest.raises(CheckpointError, match="safetensors"):
        read_header(path)


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, b"", b"", header_len=MAX_HEADER_BYTES + 1)
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="of 33554433 bytes, the limit is 33554432"):
        read_header(path)


def test_a_header_of_the_rest_of_the_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"a": entry("F32", [0], 0, 0)}, b"")
    (stored,) = read_header(path)
    assert (stored.offset, stored.num_bytes) == (path.stat().st_size, 0)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(4, 4), "b": torch.randn(3).half()}, path, {"format": "pt"})
    sound = path.read_bytes()
    rng = random.Random(0)
    num_refused = 0
    for _ in range(1000):
        damaged = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            tensors = read_header(path)
        except CheckpointError:
            num_refused += 1
            continue
        size = path.stat().st_size
        assert all(0 <= t.offset <= t.offset + t.num_bytes <= size for t in tensors)
    assert 500 < num_refused < 1000


@pytest.mark.parametrize("name", ["model.safetensors", INDEX_FILE, "m-1.safetensors"])
def test_a_link_to_a_file_that_is_gone_is_named(name: str, tmp_path: Path) -> None:
    if name == "m-1.safetensors":
        write_index(tmp_path, {"a": name})
    (tmp_path / name).symlink_to("../blobs/cleaned")
    with pytest.raises(CheckpointError, match=f"{name}: is a link to a file that is gone"):
        index_checkpoint(tmp_path)


def test_an_index_with_a_name_of_two_lines(tmp_path: Path) -> None:
    write_index(tmp_path, {"a\nb": "m.safetensors"})
    with pytest.raises(CheckpointError, match=r"the tensor name 'a\\nb' is not printable"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_what_is_not_a_regular_file(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", {"a": entry("F32", [64], 0, 256)}, b"\0" * 256)
    (stored,) = read_header(path)
    with CheckpointReader(64) as reader:
        steps = reader.copy(stored, Part(torch.empty(64)))
        next(steps)
        os.truncate(path, 200)
        with pytest.raises(CheckpointError, match="became shorter"):
            list(steps)


def write_index(folder: Path, weight_map: Any, encoding: str = "utf-8") -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / INDEX_FILE).write_text(text, encoding=encoding)


def write_shard(path: Path, *names: str) -> None:
    save_file({name: torch.ones(1) for name in names}, path)


def test_an_index_joins_its_shards(tmp_path: Path) -> None:
    first, second = tmp_path / "m-1.safetensors", tmp_path / "m-2.safetensors"
    write_shard(first, "a", "b")
    write_shard(second, "b", "c", "unlisted")
    write_index(tmp_path, {"a": first.name, "b": second.name, "c": second.name})
    tensors = index_checkpoint(tmp_path)
    assert {name: tensor.file for name, tensor in tensors.items()} == {
        "a": first,
        "b": second,
        "c": second,
        "unlisted": second,
    }


def test_an_index_behind_a_byte_order_mark(tmp_path: Path) -> None:
    write_shard(tmp_path / "m-1.safetensors", "a")
    write_index(tmp_path, {"a": "m-1.safetensors"}, encoding="utf-8-sig")
    assert set(index_checkpoint(tmp_path)) == {"a"}


@pytest.mark.parametrize("listed", ["m-1.safetensors", "m-2.safetensors"])
def test_a_tensor_in_two_shards_is_read_from_the_listed_one(listed: str, tmp_path: Path) -> None:
    for name in ("m-1.safetensors", "m-2.safetensors"):
        write_shard(tmp_path / name, "a", f"of {name}")
    own = {f"of {name}": name for name in ("m-1.safetensors", "m-2.safetensors")}
    write_index(tmp_path, {"a": listed, **own})
    assert index_checkpoint(tmp_path)["a"].file == tmp_path / listed


def test_an_index_over_the_limit_is_not_read(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "m-1.safetensors"})
    os.truncate(tmp_path / INDEX_FILE, 64 * 2**20 + 1)
    with pytest.raises(CheckpointError, match="has 67108865 bytes, the limit is 67108864"):
        index_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "m-1.safetensors", "a")
    write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"m-2\.safetensors is missing"):
        index_checkpoint(tmp_path)


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "m-1.safetensors", "a")
    write_index(tmp_path, {"a": "m-1.safetensors", "b": "m-1.safetensors"})
    with pytest.raises(CheckpointError, match="lack: b"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        {},
        ["a"],
        {"a": 1},
        {"a": "../m.safetensors"},
        {"a": "/etc/m.safetensors"},
        {"a": "sub/m.safetensors"},
        {"a": "m\0.safetensors"},
        {"a": "m.bin"},
        {"a": ".."},
        {"a": "m" * 300 + ".safetensors"},
        {"a": "m\n.safetensors"},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_index_that_points_elsewhere(weight_map: Any, tmp_path: Path) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="weight_map"):
        index_checkpoint(tmp_path)


def test_a_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pytorch_model.bin; only safetensors"):
        index_checkpoint(tmp_path)
