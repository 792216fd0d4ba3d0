"""Names of models: folders as they are, the hub's errors as lines a user can act on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pyserve.errors import ConfigError, StartupError
from pyserve.model.hub import resolve_model


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


def test_only_served_files_of_one_revision_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = resolve_model("owner/model", revision="v1", token="t", download_dir=tmp_path / "d")
    assert folder == tmp_path
    ((name, options),) = calls
    assert name == "owner/model"
    assert (options["revision"], options["token"]) == ("v1", "t")
    assert options["cache_dir"] == tmp_path / "d"
    files = [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "chat_template.jinja", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "vocab.json", "merges.txt",
        # and these not:
        "pytorch_model.bin", "modeling.py", "original/model.safetensors",
        "consolidated.safetensors", "README.md", "model.gguf",
    ]  # fmt: skip
    fetched = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(fetched) == files[:10]


def response(status: int) -> Any:
    """What the hub's errors look at, whichever HTTP library its version has."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


class OtherHttpError(Exception):
    """As the HTTP libraries have them: of no kind that we could name."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (GatedRepoError("x", response=response(403)), "gated"),
        (RepositoryNotFoundError("x", response=response(404)), "not on the hub, or is private"),
        (RevisionNotFoundError("x", response=response(404)), "no revision v1"),
        (HfHubHTTPError("x", response=response(429)), "status 429"),
        (LocalEntryNotFoundError("x"), "cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OtherHttpError("x"), "OtherHttpError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_hub_become_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(StartupError) as refusal:
        resolve("owner/model")
    message = str(refusal.value)
    assert line in message and "owner/model" in message
    assert "\n" not in message and "secret" not in message


def test_the_hub_needs_no_torch() -> None:
    script = "import sys, pyserve.model.hub; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
