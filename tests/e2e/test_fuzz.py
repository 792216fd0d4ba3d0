"""A small run of bench/fuzz.py: hostile requests of one seed, beside streams that must be exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.fuzz import main
from tests.e2e.conftest import start_server


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of memory here are wide: no need to wait until all of it has been given back."""
    monkeypatch.setattr("bench.fuzz.SETTLE_S", 0.2)


def test_hostile_requests_hurt_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # float32: greedy answers do not depend on what else is in the batch.
    with start_server(tmp_path / "log", "--dtype", "float32") as server:
        pid = str(server.process.pid)
        # A short run is still warming up where its memory is first read.
        flags = ["--url", server.url, "--pid", pid, "--log", str(server.log)]
        # Limits of time are for quiet machines: here only what stands still is caught.
        flags += ["--max-growth-mib", "64", "--max-health-s", "10", "--max-gap-s", "20"]
        code = main(["-n", "1000", "--seed", "4", *flags])
        output = capsys.readouterr().out
        assert code == 0, output
        assert "1,000 cases" in output


def test_large_requests_of_one_client_are_another_s_to_live_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As much as each may ask of everything; the neighbour has another address."""
    with start_server(tmp_path / "log", "--dtype", "float32") as server:
        flags = ["--url", server.url, "--pid", str(server.process.pid), "--log", str(server.log)]
        flags += ["--max-growth-mib", "128", "--max-health-s", "10", "--max-gap-s", "20"]
        code = main(["-n", "24", "-c", "8", "--seed", "3", "--family", "large", *flags])
        output = capsys.readouterr().out
        assert code == 0, output
        assert "24 cases" in output


def test_what_templates_of_requests_do_is_not_felt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One call into C inside of one could hold the interpreter, and with it everybody."""
    server_flags = ("--dtype", "float32", "--trust-request-chat-template")
    with start_server(tmp_path / "log", *server_flags) as server:
        flags = ["--url", server.url, "--pid", str(server.process.pid), "--log", str(server.log)]
        flags += ["--max-growth-mib", "256", "--max-health-s", "10", "--max-gap-s", "20"]
        code = main(["-n", "10", "-c", "4", "--seed", "3", "--family", "template", *flags])
        output = capsys.readouterr().out
        assert code == 0, output
        assert "10 cases" in output
