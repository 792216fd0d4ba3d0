"""Ops for the decoder: the native ones, or their twins where there is no compiler; a hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from pyserve import log
from pyserve.model import download, hub, hub_client
from pyserve.ops import build
from tests.model.hub_stub import PART_BYTES, REPO, HubStub, running_hub, write_model

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(scope="session", autouse=True)
def ops() -> None:
    build.load_native(allow_reference=True, progress=print)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(before)


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
    monkeypatch.setattr(hub_client, "BACKOFF_S", 0.01)
    monkeypatch.setattr(hub_client, "STALL_S", 0.4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    forget_proxies(monkeypatch)
    log.get_logger().setLevel("INFO")
    folder = tmp_path / "model"
    write_model(folder)
    with running_hub() as stub:
        stub.add_folder(REPO, folder)
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)
        yield stub
