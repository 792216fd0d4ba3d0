"""Phases of the start-up: progress, speed, what they add up to, and their end."""

from __future__ import annotations

import re
import time

import pytest

from pyserve.api.life.startup import Startup, StopLoading


def test_progress_and_eta() -> None:
    startup = Startup()
    assert startup.describe() == {"phase": "start", "progress": None, "eta_s": None, "ended": {}}
    startup.report("load", 0, 100)
    described = startup.describe()
    ended = described.pop("ended")
    assert isinstance(ended, dict) and list(ended) == ["start"] and ended["start"] >= 0.0
    assert described == {"phase": "load", "progress": 0.0, "eta_s": None}
    startup.report("load", 50, 100)
    began_s = startup.phase.began_s
    assert startup.phase.eta_s(began_s + 3.0) == 3.0
    startup.report("load", 150, 100)
    assert startup.phase.progress == 1.0 and startup.phase.eta_s(began_s + 3.0) == 0.0


def test_the_clock_of_the_speed_starts_with_the_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("pyserve.api.life.startup.time.monotonic", lambda: now_s)
    startup = Startup()
    startup.report("build", 0, 0)
    assert startup.phase.progress is None and startup.phase.eta_s(now_s) is None
    now_s = 130.0  # the card has been looked at meanwhile
    startup.report("build", 0, 40)
    ended = {"start": round(100.0 - startup._began_s, 1)}
    assert startup.describe() == {
        "phase": "build", "progress": 0.0, "eta_s": None, "ended": ended,
    }  # fmt: skip
    now_s = 140.0
    startup.report("build", 10, 40)
    assert startup.describe()["progress"] == 0.25 and startup.describe()["eta_s"] == 30.0
    startup.report("build", 10, 20)  # less is left to do than was thought
    assert startup.describe()["progress"] == 0.5 and startup.describe()["eta_s"] == 10.0
    assert startup.phase.began_s == 100.0


def test_a_report_after_the_end_stops_who_loads() -> None:
    startup = Startup()
    startup.give_up()
    with pytest.raises(StopLoading):
        startup.report("load", 1, 2)
    assert not issubclass(StopLoading, Exception), "nobody on the way takes it for an error"


def test_the_phases_add_up_from_the_exec_on(caplog: pytest.LogCaptureFixture) -> None:
    startup = Startup()
    began_s = startup.phase.began_s
    assert 0.0 < time.monotonic() - began_s < 3600.0  # this test process is older than `startup`
    for name in ("download", "start", "load"):
        startup.report(name, 0, 0)
        time.sleep(0.06)
    finished_s = time.monotonic()
    startup.finish()
    explained = startup.explain()
    elapsed_s = startup.elapsed_s
    figure = r"(\d+\.\d)"
    told = re.fullmatch(
        rf"start {figure} \+ download {figure} \+ load {figure} = {figure} s", explained
    )
    assert told, explained
    start_s, download_s, load_s, total_s = map(float, told.groups())
    assert download_s >= 0.1 and load_s >= 0.1  # 0.06 and more
    assert abs(start_s + download_s + load_s - total_s) < 0.21
    assert finished_s - began_s - 0.06 < total_s < elapsed_s + 0.06
