"""A small run of bench/hostile_clients.py: connections that misbehave, beside exact streams."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import hostile_clients
from tests.e2e.conftest import start_server


def test_hostile_clients_hurt_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("CONNECTIONS", 600), ("SLOW_BODIES", 100), ("UPLOADS", 10), ("GONE", 8)):
        monkeypatch.setattr(hostile_clients, f"NUM_{name}", number)
    monkeypatch.setattr(hostile_clients, "NUM_UNREAD", 40)
    monkeypatch.setattr(hostile_clients, "HOLD_S", 0.5)
    monkeypatch.setattr(hostile_clients, "GONE_S", 10.0)  # for a busy machine; without: 10 and more
    # float32: greedy answers do not depend on what else is in the batch.
    with start_server(tmp_path / "log", "--dtype", "float32") as server:
        flags = ["--url", server.url, "--pid", str(server.process.pid)]
        code = hostile_clients.main([*flags, "--max-health-s", "5", "--max-gap-s", "20"])
        output = capsys.readouterr().out
        assert code == 0, output
        assert "Traceback" not in server.log.read_text()
