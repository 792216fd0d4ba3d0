"""Mirrors of the hub that list names only, and the proxies on the way to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pyserve.errors import StartupError
from pyserve.hub.resolve import resolve_model
from tests.hub.hub_stub import CDN, REPO, WEIGHTS, Fault, HubStub

SERVED = {WEIGHTS, "config.json", "tokenizer.json", "generation_config.json"}


def fetch(tmp_path: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {"revision": None, "token": None, "download_dir": tmp_path / "cache"}
    return resolve_model(REPO, **(defaults | options))


def refusal(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(StartupError) as error:
        fetch(tmp_path, **options)
    return str(error.value)


def test_a_mirror_that_lists_names_only(stub: HubStub, tmp_path: Path) -> None:
    """Each file that is served is asked for its size and checksum; the others are not."""
    stub.names_only = True
    folder = fetch(tmp_path, token="hf_secret")
    assert {path.name for path in folder.iterdir()} == SERVED
    for name in SERVED:
        assert (folder / name).read_bytes() == stub.repos[REPO][name]
    asked = [seen for seen in stub.seen if seen.method == "HEAD"]
    assert {seen.path.rpartition("/")[2] for seen in asked} == SERVED and len(asked) == len(SERVED)
    assert all(seen.token == "Bearer hf_secret" and stub.commit in seen.path for seen in asked)
    stub.close()
    assert fetch(tmp_path) == folder


def test_what_such_a_mirror_gets_wrong(
    stub: HubStub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub.names_only = True
    stub.faults = {"resolve": [Fault(status=503, headers={"Retry-After": "0"}), Fault()]}
    fetch(tmp_path)
    assert "status 503; trying again" in caplog.text
    stub.faults = {}
    stub.gated = True
    assert "is gated" in refusal(tmp_path, download_dir=tmp_path / "2")
    stub.gated = False
    stub.faults = {"config.json": [Fault(status=404)]}
    line = refusal(tmp_path, download_dir=tmp_path / "2")
    assert "lists config.json but does not have it" in line or "generation_config.json" in line
    stub.faults = {}
    stub.no_checksums = True
    line = refusal(tmp_path, download_dir=tmp_path / "2")
    assert "tells no size and checksum of" in line and "pass its folder" in line


@pytest.fixture
def proxy(stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> HubStub:
    """The stub is reached as the proxy of a hub whose name nobody else knows."""
    stub.is_proxy = True
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    return stub


@pytest.mark.parametrize("scheme", ["", "http://"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_a_proxy_however_it_is_given(
    proxy: HubStub, tmp_path: Path, variable: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"{scheme}127.0.0.1:{proxy.port}")
    folder = fetch(tmp_path)
    assert (folder / WEIGHTS).read_bytes() == proxy.repos[REPO][WEIGHTS]
    assert proxy.sent(CDN) > 0, "also what is redirected"


def test_a_proxy_that_is_not_there(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", "user:word@127.0.0.1:9")
    line = refusal(tmp_path)
    assert "the proxy 127.0.0.1:9 (HTTP_PROXY) cannot be reached, 5 times" in line
    assert "word" not in line
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{stub.port}")
    assert "the proxy refuses it (status 501)" in refusal(tmp_path)


@pytest.mark.parametrize("no_proxy", ["127.0.0.1,localhost", "*"])
def test_no_proxy_is_kept(
    stub: HubStub, tmp_path: Path, no_proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", no_proxy)
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    assert {path.name for path in fetch(tmp_path).iterdir()} == SERVED
