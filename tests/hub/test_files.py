"""Which files of a repository are fetched, and stand-ins that git leaves in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyserve.checkpoint_files import INDEX_FILE, SINGLE_FILE
from pyserve.errors import CheckpointError
from pyserve.hub.client import Listing, RemoteFile
from pyserve.hub.files import served_texts, served_weights
from pyserve.hub.resolve import resolve_model

NAMED = "--model a/b"
POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def files_of(*names: str) -> Listing:
    return Listing("0" * 40, {name: RemoteFile(name, 1, "0" * 40) for name in names})


SERVED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja",
    "vocab.json", "merges.txt", "modules.json", "1_Pooling/config.json",
]  # fmt: skip
NOT_SERVED = [
    "pytorch_model.bin", "modeling.py", "original/config.json", "README.md", "model.gguf",
    "tokenizer.py", "additional_chat_templates/../x.jinja", "onnx/model.onnx", ".gitattributes",
]  # fmt: skip


def test_only_served_files_are_fetched() -> None:
    listing = files_of(*NOT_SERVED, *SERVED, INDEX_FILE)
    assert [file.name for file in served_texts(listing, "texts")] == SERVED
    assert [file.name for file in served_texts(listing, "model")] == [*SERVED, INDEX_FILE]


def test_one_format_of_weights(tmp_path: Path) -> None:
    """The loader's choice: one file, else what the index lists; never the same weights twice."""
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    several = files_of(INDEX_FILE, *others, *parts)
    assert [file.name for file in served_weights(several, tmp_path, named=NAMED)] == parts
    single = files_of(SINGLE_FILE, INDEX_FILE, *others, *parts)
    assert [f.name for f in served_weights(single, tmp_path, named=NAMED)] == [SINGLE_FILE]
    with pytest.raises(CheckpointError, match=r"no weights as safetensors .*, only .bin and .gguf"):
        served_weights(files_of("pytorch_model.bin", "model.gguf"), tmp_path, named=NAMED)
    with pytest.raises(CheckpointError, match=f"lists {parts[1]}, which is not there"):
        served_weights(files_of(INDEX_FILE, parts[0]), tmp_path, named=NAMED)


def test_an_index_behind_a_byte_order_mark(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "m.safetensors"}})
    (tmp_path / INDEX_FILE).write_text(index, encoding="utf-8-sig")
    listing = files_of(INDEX_FILE, "m.safetensors")
    weights = served_weights(listing, tmp_path, named=NAMED)
    assert [file.name for file in weights] == ["m.safetensors"]


@pytest.mark.parametrize(
    "index",
    ["", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}',
     '{"weight_map": {"a": "pytorch_model.bin"}}', '{"weight_map": {"a": 1}}'],
)  # fmt: skip
def test_an_index_that_lists_nothing_of_this_folder(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        served_weights(files_of(INDEX_FILE), tmp_path, named=NAMED)


@pytest.mark.parametrize(
    "name", [SINGLE_FILE, "model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer.model"]
)
@pytest.mark.parametrize("flag", ["--model", "--tokenizer"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str, flag: str) -> None:
    def resolve() -> Path:
        return resolve_model(str(tmp_path), revision=None, token=None, download_dir=None, flag=flag)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text(POINTER)  # nobody reads it
    (tmp_path / "a folder.safetensors").mkdir()
    assert resolve() == tmp_path
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError) as refusal:
        resolve()
    line = f"{flag} {tmp_path}: {name} is a git-lfs pointer"
    assert str(refusal.value).startswith(line) and "run git lfs pull" in str(refusal.value)


def test_a_text_that_is_no_pointer(tmp_path: Path) -> None:
    for text in (POINTER[:20], POINTER + " " * 1024, ""):
        (tmp_path / "tokenizer.json").write_text(text)
        assert (
            resolve_model(str(tmp_path), revision=None, token=None, download_dir=None) == tmp_path
        )
