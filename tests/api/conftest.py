"""One server for all tests of this folder; each test plays its own script on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve.api.http import http_protocol
from tests.api.fakes import Server, make_tokenizer_folder, run_server


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("api") / "tiny")


@pytest.fixture(scope="session", autouse=True)
def _short_ends() -> Iterator[None]:
    """A server here ends while clients of it are still there, and nobody waits for a last frame."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_protocol, "LAST_FRAMES_S", 0.1)
        yield


@pytest.fixture(scope="session")
def shared_server(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.engine.error = None
    shared_server.engine.num_cached_tokens = 0
    shared_server.play("Hello")
    return shared_server
