"""Names of models: folders as they are, and which files of a repository are fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyserve.errors import CheckpointError, ConfigError
from pyserve.model import hub
from pyserve.model.checkpoint_files import INDEX_FILE, SINGLE_FILE
from pyserve.model.hub import resolve_model
from pyserve.model.hub_client import Listing, RemoteFile


def resolve(name: str) -> Path:
    return resolve_model(name, revision="v1", token="secret", download_dir=None)


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve("~/models") == tmp_path / "models"


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file"):
        resolve(str(file))


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/folder",
        "./none",
        "../none",
        "~/none",
        "a/b/c",
        "",
        "a b",
        "a\n",
        "~nobody",
        "-x",
        "x" * 5000,
        "a\0",
    ],
)
def test_what_is_neither_folder_nor_name(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a name"):
        resolve(name)


@pytest.mark.parametrize("revision", ["", "../x", "a b", "x" * 300, "/main", "-main"])
def test_what_is_no_revision(revision: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--revision .* is no branch, tag or commit"):
        resolve_model("owner/model", revision=revision, token=None, download_dir=tmp_path)


def files_of(*names: str) -> Listing:
    return Listing("0" * 40, {name: RemoteFile(name, 1, "0" * 40) for name in names})


SERVED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja",
    "vocab.json", "merges.txt",
]  # fmt: skip
NOT_SERVED = [
    "pytorch_model.bin", "modeling.py", "original/config.json", "README.md", "model.gguf",
    "tokenizer.py", "additional_chat_templates/../x.jinja", "onnx/model.onnx", ".gitattributes",
]  # fmt: skip


def test_only_served_files_are_fetched() -> None:
    listing = files_of(*NOT_SERVED, *SERVED, INDEX_FILE)
    assert [file.name for file in hub._texts(listing, with_weights=False)] == SERVED
    assert [file.name for file in hub._texts(listing, with_weights=True)] == [*SERVED, INDEX_FILE]


def wanted(tmp_path: Path) -> hub._Wanted:
    return hub._wanted("a/b", None, None, tmp_path, flag="--model", with_weights=True)


def test_one_format_of_weights(tmp_path: Path) -> None:
    """The loader's choice: one file, else what the index lists; never the same weights twice."""
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["consolidated.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    several = files_of(INDEX_FILE, *others, *parts)
    assert [file.name for file in hub._weights(wanted(tmp_path), several, tmp_path)] == parts
    single = files_of(SINGLE_FILE, INDEX_FILE, *others, *parts)
    assert [f.name for f in hub._weights(wanted(tmp_path), single, tmp_path)] == [SINGLE_FILE]
    with pytest.raises(CheckpointError, match=r"no weights as safetensors .*, only .bin and .gguf"):
        hub._weights(wanted(tmp_path), files_of("pytorch_model.bin", "model.gguf"), tmp_path)
    with pytest.raises(CheckpointError, match=f"lists {parts[1]}, which is not there"):
        hub._weights(wanted(tmp_path), files_of(INDEX_FILE, parts[0]), tmp_path)


def test_an_index_behind_a_byte_order_mark(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "m.safetensors"}})
    (tmp_path / INDEX_FILE).write_text(index, encoding="utf-8-sig")
    listing = files_of(INDEX_FILE, "m.safetensors")
    weights = hub._weights(wanted(tmp_path), listing, tmp_path)
    assert [file.name for file in weights] == ["m.safetensors"]


@pytest.mark.parametrize(
    "index",
    ["", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}',
     '{"weight_map": {"a": "pytorch_model.bin"}}', '{"weight_map": {"a": 1}}'],
)  # fmt: skip
def test_an_index_that_lists_nothing_of_this_folder(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX_FILE):
        hub._weights(wanted(tmp_path), files_of(INDEX_FILE), tmp_path)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
def test_a_token_that_no_header_takes(
    tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match="the access token of the hub") as refusal:
        resolve_model("owner/model", revision=None, token=token, download_dir=tmp_path)
    assert token not in str(refusal.value)


def test_the_hub_needs_no_torch() -> None:
    script = "import sys, pyserve.model.hub; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
