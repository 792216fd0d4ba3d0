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


@pytest.mark.parametrize(
    ("num_cases", "flags", "max_growth_mib"),
    [
        (400, "--seed 4", 64),
        # As much as each request may ask of everything; the neighbour has another address.
        (12, "-c 8 --seed 3 --family large", 128),
        # One call into C inside of a template could hold the interpreter, and with it everybody.
        (6, "-c 4 --seed 3 --family template", 256),
    ],
    ids=["of all families", "large", "templates"],
)
def test_hostile_requests_hurt_nobody(
    exact: Server, capsys: pytest.CaptureFixture[str], num_cases: int, flags: str,
    max_growth_mib: int,
) -> None:  # fmt: skip
    """Limits of time are for quiet machines: here only what stands still is caught. A short run is
    still warming up where its memory is first read."""
    of_server = ["--url", exact.url, "--pid", str(exact.process.pid), "--log", str(exact.log)]
    limits = ["--max-growth-mib", str(max_growth_mib), "--max-health-s", "10", "--max-gap-s", "20"]
    code = main(["-n", str(num_cases), *flags.split(), *of_server, *limits])
    output = capsys.readouterr().out
    assert code == 0, output
    assert f"{num_cases} cases" in output
