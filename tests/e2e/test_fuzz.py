"""A small run of bench/fuzz.py: hostile requests of one seed, beside streams that must be exact."""

from __future__ import annotations

import pytest

from bench.fuzz import main
from tests.e2e.conftest import Server


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of memory here are wide: no need to wait until all of it has been given back."""
    for name, value in (("SETTLE_S", 0.1), ("SETTLE_TIMEOUT_S", 0.1), ("SETTLE_GRAMMARS", 8)):
        monkeypatch.setattr(f"bench.fuzz.{name}", value)


def fuzz(server: Server, *flags: str, max_growth_mib: int) -> int:
    """Limits of time are for quiet machines: here only what stands still is caught. A short run is
    still warming up where its memory is first read."""
    of_server = ["--url", server.url, "--pid", str(server.process.pid), "--log", str(server.log)]
    limits = ["--max-health-s", "10", "--max-gap-s", "20", "--max-first-s", "20"]
    return main([*flags, *of_server, *limits, "--max-growth-mib", str(max_growth_mib)])


def test_hostile_requests_hurt_nobody(exact: Server, capsys: pytest.CaptureFixture[str]) -> None:
    code = fuzz(exact, "-n", "1000", "--seed", "4", max_growth_mib=64)
    output = capsys.readouterr().out
    assert code == 0, output
    assert "1,000 cases" in output


def test_large_requests_of_one_client_are_another_s_to_live_with(
    exact: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """As much as each may ask of everything; the neighbour has another address."""
    flags = ("-n", "24", "-c", "8", "--seed", "3", "--family", "large")
    code = fuzz(exact, *flags, max_growth_mib=128)
    output = capsys.readouterr().out
    assert code == 0, output
    assert "24 cases" in output


def test_what_templates_of_requests_do_is_not_felt(
    exact: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """One call into C inside of one could hold the interpreter, and with it everybody."""
    flags = ("-n", "10", "-c", "4", "--seed", "3", "--family", "template")
    code = fuzz(exact, *flags, max_growth_mib=256)
    output = capsys.readouterr().out
    assert code == 0, output
    assert "10 cases" in output
