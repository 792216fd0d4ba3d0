"""Names of models: folders as they are, and which files of a repository are fetched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pyserve.errors import ConfigError
from pyserve.hub.resolve import model_headers, resolve_model
from tests.hub.hub_stub import REPO, HubStub


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


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "schlüssel"])
def test_a_token_that_no_header_takes(
    tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match="the access token of the hub") as refusal:
        resolve_model("owner/model", revision=None, token=token, download_dir=tmp_path)
    assert token not in str(refusal.value)


def test_the_hub_needs_no_torch() -> None:
    script = "import sys, pyserve.hub.resolve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_what_says_that_a_model_pools_comes_with_its_config(stub: HubStub, tmp_path: Path) -> None:
    """Before the weights, too, and where only the headers are wanted."""
    modules = {"modules.json": b"[]", "1_Pooling/config.json": b'{"a": 1}'}
    stub.repos[REPO] |= modules | {"1_Pooling/other.json": b"never fetched"}

    def look(folder: Path) -> None:
        assert {name: (folder / name).read_bytes() for name in modules} == modules
        assert not (folder / "1_Pooling" / "other.json").exists()

    looked: list[Path] = []

    def check(folder: Path) -> None:
        look(folder)
        looked.append(folder)

    settings: dict[str, Any] = {"revision": None, "token": None}
    with model_headers(REPO, download_dir=tmp_path / "none", **settings) as headers:
        look(headers)
    look(resolve_model(REPO, download_dir=tmp_path / "cache", check=check, **settings))
    assert looked
