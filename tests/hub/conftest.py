"""A hub that runs here, with one model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pyserve import log
from pyserve.hub import client, download, resolve
from tests.hub.hub_stub import PART_BYTES, REPO, HubStub, running_hub, write_model

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def forget_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine; what a test makes of the variables is undone too."""
    for name in PROXIES:
        for variable in (name, name.upper()):
            monkeypatch.setenv(variable, "")
            monkeypatch.delenv(variable)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A hub with one model; short parts, short waits, nobody's own token and no proxies."""
    monkeypatch.setattr(download, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(client, "STALL_S", 0.4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolve, "get_token", lambda: None)
    forget_proxies(monkeypatch)
    log.get_logger().setLevel("INFO")
    folder = tmp_path / "model"
    write_model(folder)
    with running_hub() as stub:
        stub.add_folder(REPO, folder)
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        yield stub
