"""The real server with a model of the hub: a stub of it hands out the demo model's files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.config import DEMO_MODEL
from pyserve.hub.files import FIRST_BYTES
from tests.e2e.conftest import Server, start_server
from tests.hub.hub_stub import CDN, HubStub, running_hub

REPO = "org/demo"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with running_hub() as stub:
        stub.add_folder(REPO, DEMO_MODEL)
        monkeypatch.setenv("HF_ENDPOINT", stub.endpoint)
        yield stub


def health(server: Server) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(server.get("/health")[1])
    return body


def watch_download(server: Server, until: float) -> list[float]:
    """The progress of the phase "download" that /health shows, until it is `until`."""
    shown: list[float] = []
    deadline = time.monotonic() + 60
    while not shown or shown[-1] < until:
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < deadline, shown
        try:
            body = health(server)
        except OSError:
            continue
        if body["phase"] == "download" and body["progress"] is not None:
            shown.append(body["progress"])
        elif shown:
            break
        time.sleep(0.02)
    return shown


def wait_failed(server: Server) -> str:
    assert server.process.wait(60) == 1
    lines = server.log.read_text().splitlines()
    (line,) = [line for line in lines if " ERROR " in line]
    return line


def test_download_kill_resume_serve_and_start_without_the_hub(hub: HubStub, tmp_path: Path) -> None:
    size = len(hub.repos[REPO]["model.safetensors"])
    flags = ("--model", REPO, "--download-dir", str(tmp_path / "models"))
    hub.rate = 4e6
    with start_server(tmp_path / "log", *flags, ready_timeout_s=0) as server:
        shown = watch_download(server, until=0.3)
        assert shown[0] < 0.3 and shown == sorted(shown)
        status, body = server.get("/v1/models")
        assert status == 503 and b"phase download" in body, "and the server says so"
    hub.rate = None
    with start_server(tmp_path / "log2", *flags) as server:  # the first was killed
        assert server.json("/v1/completions", {"model": REPO, "prompt": "Hello", "max_tokens": 4})
    assert hub.sent(CDN) < size + 2 * FIRST_BYTES + 0.1 * size, "it went on where it stood"
    hub.close()
    with start_server(tmp_path / "log3", *flags) as server:
        assert "the hub is not asked" in server.log.read_text()


def test_what_is_refused_before_the_first_byte_of_weights(hub: HubStub, tmp_path: Path) -> None:
    flags = ("--model", REPO, "--max-model-len", "4096", "--kv-cache-memory-bytes", "100000")
    with start_server(tmp_path / "log", *flags, ready_timeout_s=0) as server:
        server.process.wait(60)
        log = server.log.read_text()
        assert "a context of 4096 tokens does not fit" in log and "weights" in log
    assert hub.sent(CDN) <= FIRST_BYTES
    hub.gated = True
    with start_server(tmp_path / "log2", "--model", REPO, ready_timeout_s=0) as server:
        line = wait_failed(server)
    assert f"accept its terms at {hub.endpoint}/{REPO}" in line and "--hf-token" in line
