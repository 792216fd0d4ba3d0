"""/health tells the truth, and the watchdog how late the loop is."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from pyserve.api.endpoints.health import describe
from pyserve.api.life import watchdog
from pyserve.api.life.watchdog import RECENT_S, LoopWatchdog
from pyserve.client import EngineStats
from tests.api.fakes import Server


def stats(step_age_s: float, deadline_s: float | None) -> EngineStats:
    return EngineStats(
        num_running=1, num_waiting=0, num_blocks_used=1, num_preemptions=0, num_steps=9,
        prompt_tokens=0, cached_tokens=0, output_tokens=0, step_age_s=step_age_s, error=None,
        step_deadline_s=deadline_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step_age_s", "deadline_s", "status"), [(5.0, None, 200), (5.0, 10.0, 200), (11.0, 10.0, 503)]
)
def test_a_step_beyond_its_deadline_is_not_healthy(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    step_age_s: float,
    deadline_s: float | None,
    status: int,
) -> None:
    monkeypatch.setattr(server.engine, "stats", lambda: stats(step_age_s, deadline_s))
    code, body = describe(server.state)
    assert code == status
    if status == 503:
        assert body == {
            "status": "stuck",
            "reason": "a step has run for 11.0 s, its limit is 10.0 s",
        }
    else:
        assert body["status"] == "ready" and body["step_age_s"] == step_age_s
    assert server.request("GET", "/health/ready")[0] == status
    assert server.request("GET", "/health/live")[0] == 200


def test_live_while_starting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.state, "status", "starting")
    status, _, body = server.request("GET", "/health/live")
    assert status == 200 and json.loads(body)["status"] == "live"
    assert server.request("GET", "/health/ready")[0] == 503


def test_the_watchdog_sees_a_blocked_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> LoopWatchdog:
        dog = LoopWatchdog(lambda: 1)
        dog.start()
        await asyncio.sleep(0.12)
        time.sleep(0.3)
        await asyncio.sleep(0.12)
        time.sleep(0.2)
        await asyncio.sleep(0.12)
        dog.stop()
        return dog

    monkeypatch.setattr(watchdog, "BEAT_S", 0.02)
    dog = asyncio.run(test())
    assert 0.25 < dog.max_lag_s < 5.0 and dog.recent_lag_s == dog.max_lag_s
    assert dog.num_late >= 2
    lines = [r for r in caplog.records if "the event loop was late" in r.message]
    assert len(lines) == 1  # the second one waits for its turn


def test_a_tenth_of_a_second_is_late_and_less_is_not(caplog: pytest.LogCaptureFixture) -> None:
    dog = LoopWatchdog(lambda: 1)
    dog.note(0.09, 1000.0)
    assert dog.num_late == 0 and dog.max_lag_s == 0.09 and not caplog.records
    dog.note(0.11, 1001.0)
    assert dog.num_late == 1 and "by up to 110 ms (1 time)" in caplog.text


def test_the_watchdog_forgets_and_logs_again(caplog: pytest.LogCaptureFixture) -> None:
    dog = LoopWatchdog(lambda: 1)
    now = 1000.0
    dog.note(0.5, now)
    assert dog.recent_lag_s == 0.5
    for _ in range(2):
        now += RECENT_S / 2
        dog.note(0.0, now)
        dog.note(0.2, now)
    assert dog.recent_lag_s == 0.2 and dog.max_lag_s == 0.5
    assert len(caplog.records) == 3
    assert "by up to 500 ms (1 time)" in caplog.text
    dog.forget()
    assert dog.max_lag_s == dog.recent_lag_s == 0.0 and dog.num_late == 0


@pytest.mark.parametrize(
    ("before", "after", "is_told"), [(0, 0, False), (1, 0, True), (0, 1, True), (64, 64, True)]
)
def test_a_late_loop_is_told_where_a_request_has_waited(
    before: int, after: int, is_told: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    num_requests = before

    async def test() -> LoopWatchdog:
        nonlocal num_requests
        dog = LoopWatchdog(lambda: num_requests)
        dog.start()
        await asyncio.sleep(0.05)
        time.sleep(0.3)
        num_requests = after
        await asyncio.sleep(0.05)
        dog.stop()
        return dog

    monkeypatch.setattr(watchdog, "BEAT_S", 0.02)
    dog = asyncio.run(test())
    assert dog.recent_lag_s > 0.25 and dog.num_late >= 1, "the figures know of it in any case"
    assert ("the event loop was late" in caplog.text) == is_told
