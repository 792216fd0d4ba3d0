"""A small run of bench/hostile_clients.py: connections that misbehave, beside exact streams."""

from __future__ import annotations

import pytest

from bench import hostile_clients
from tests.e2e.conftest import Server


def test_hostile_clients_hurt_nobody(
    exact: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("CONNECTIONS", 600), ("SLOW_BODIES", 100), ("UPLOADS", 10), ("GONE", 8)):
        monkeypatch.setattr(hostile_clients, f"NUM_{name}", number)
    monkeypatch.setattr(hostile_clients, "NUM_UNREAD", 40)
    monkeypatch.setattr(hostile_clients, "HOLD_S", 0.2)
    monkeypatch.setattr(hostile_clients, "GONE_S", 10.0)  # for a busy machine; without: 10 and more
    flags = ["--url", exact.url, "--pid", str(exact.process.pid)]
    code = hostile_clients.main([*flags, "--max-health-s", "5", "--max-gap-s", "20"])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "Traceback" not in exact.log.read_text()
