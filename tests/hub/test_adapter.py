"""Adapters of the hub: what is fetched of their repositories, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import CheckpointError, ConfigError, StartupError
from pyserve.hub.resolve import resolve_adapter, resolve_model
from tests.hub.hub_stub import REPO, HubStub
from tests.model.safetensors_files import entry, write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def repo(stub: HubStub, tmp_path: Path) -> dict[str, bytes]:
    """An adapter beside all that a training run leaves."""
    path = tmp_path / WEIGHTS
    write(path, {"a.lora_A.weight": entry("F32", [16, 4], 0, 256)}, bytes(256))
    files = {
        CONFIG: b'{"r": 4}',
        WEIGHTS: path.read_bytes(),
        "optimizer.pt": bytes(300_000),
        "training_args.bin": bytes(5000),
        "README.md": b"# x",
        "tokenizer.json": b"{}",
        "checkpoint-100/" + WEIGHTS: bytes(9000),
    }
    stub.repos = {REPO: files}
    return files


def fetch(tmp_path: Path, **options: Any) -> Path:
    given: dict[str, Any] = {"flag": "--lora-modules sql", "token": None}
    return resolve_adapter(REPO, download_dir=tmp_path / "cache", **(given | options))


def test_only_its_own_files_are_fetched_and_once(
    stub: HubStub, repo: dict[str, bytes], tmp_path: Path
) -> None:
    reports: list[tuple[int, int]] = []
    folder = fetch(tmp_path, progress=lambda *report: reports.append(report))
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert all((folder / name).read_bytes() == repo[name] for name in (CONFIG, WEIGHTS))
    num_bytes = len(repo[CONFIG]) + len(repo[WEIGHTS])
    assert reports[-1] == (num_bytes, num_bytes)
    stub.seen.clear()
    assert fetch(tmp_path) == folder and stub.seen == []


def test_a_folder_is_taken_as_it_is(stub: HubStub, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    found = resolve_adapter(
        str(tmp_path / "own"), flag="x", token=None, download_dir=tmp_path / "cache"
    )
    assert found == tmp_path / "own" and stub.seen == []


@pytest.mark.parametrize(("missing", "reason"), [(WEIGHTS, ", only .bin and .pt"), (CONFIG, "")])
def test_what_is_no_adapter_is_refused_before_its_weights(
    stub: HubStub, repo: dict[str, bytes], tmp_path: Path, missing: str, reason: str
) -> None:
    del repo[missing]
    with pytest.raises(CheckpointError) as caught:
        fetch(tmp_path)
    assert f"--lora-modules sql {REPO} is no adapter: there is no {missing}{reason}" in str(
        caught.value
    )
    assert stub.sent(WEIGHTS) == 0


def test_names_that_are_none(stub: HubStub, tmp_path: Path) -> None:
    for name in ("", "/nowhere", "a/b/c", "../x", "a b/c"):
        with pytest.raises(ConfigError, match="neither a folder nor a name on the hub"):
            resolve_adapter(name, flag="x", token=None, download_dir=tmp_path)
    stub.repos = {}
    with pytest.raises(StartupError, match=REPO):
        fetch(tmp_path)


def test_a_model_s_notes_are_not_taken_for_an_adapter_s(
    stub: HubStub, repo: dict[str, bytes], tmp_path: Path
) -> None:
    """A repository may be both."""
    repo |= {"config.json": b"{}", "model.safetensors": repo[WEIGHTS]}
    options = {"revision": None, "token": None, "download_dir": tmp_path / "cache"}
    model = resolve_model(REPO, **options)  # type: ignore[arg-type]
    assert not (model / CONFIG).exists()
    assert fetch(tmp_path) == model and (model / CONFIG).exists()
