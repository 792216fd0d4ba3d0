"""The first start on a machine, which compiles: what is shown of it, and Ctrl-C in its middle."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.e2e.conftest import Server, start_server
from tests.ops.fake_compiler import FAKE_COMPILER, processes_of
from tests.waiting import wait_until


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler in force that is never done while the file `hold` beside it exists."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    program = folder / "c++"
    program.write_text(FAKE_COMPILER.format(folder=folder))
    program.chmod(0o755)
    (folder / "hold").touch()
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYSERVE_SANITIZE", "1")  # products in the package are not looked at
    return folder


def build_phase(server: Server) -> tuple[float, float] | None:
    """Progress and seconds left, once both are told."""
    try:
        body = json.loads(server.get("/health")[1])
    except OSError:
        return None
    if body["phase"] != "build" or not body["progress"] or body["eta_s"] is None:
        return None
    return body["progress"], body["eta_s"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_compile_is_shown_and_can_be_ended(
    tmp_path: Path, compiler: Path, number: signal.Signals
) -> None:
    with start_server(tmp_path / "log", ready_timeout_s=0) as server:
        wait_until(lambda: build_phase(server))
        first = build_phase(server)
        wait_until(lambda: (build_phase(server) or (0, 0)) > (first or (1, 0)))
        status, reply = server.request("POST", "/v1/completions", b"{}")
        assert status == 503 and b"phase build, " in reply
        wait_until(lambda: processes_of(compiler))
        server.process.send_signal(number)
        assert server.process.wait(20) == (130 if number == signal.SIGINT else 0)
        log = server.log.read_text()
    assert processes_of(compiler) == []
    assert "told to stop while starting" in log
    assert not any(word in log for word in ("Traceback", "ERROR", "late", "compiling: ")), log
    assert [*(tmp_path / "cache").rglob("*.o")] == []
