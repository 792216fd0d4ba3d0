"""The neighbour sees what the server does, and not what is done to the process of the bench."""

from __future__ import annotations

import asyncio
import time

import pytest

from bench.neighbour import MAX_GAPS, Gap, Lateness, Neighbour, Seen
from bench.stub import StubConfig, running_stub, running_stub_processes
from pyserve.http_client import Endpoint
from tests.waiting import until

BUSY_S = 1.5


def watch(url: str, *, busy_s: float = 0.0, num_streams: int = 4) -> Seen:
    """What it sees while this process stands still for `busy_s`, and until it has had streams."""
    seen = Seen()

    async def run() -> None:
        neighbour = Neighbour(Endpoint.parse(url), seen)
        await neighbour.start()
        time.sleep(busy_s)
        await until(lambda: seen.num_streams >= num_streams, pause_s=0.05)
        await neighbour.stop()

    asyncio.run(run())
    return seen


def test_a_busy_bench_is_no_gap() -> None:
    with running_stub_processes(1, StubConfig(delay_s=0.002)) as url:
        seen = watch(url, busy_s=BUSY_S)
    assert seen.num_streams >= 4
    assert 0 < seen.max_first_s < BUSY_S / 2
    assert seen.max_gap_s < BUSY_S / 2
    # The stub has no /health: that is seen, and nothing else is wrong.
    assert all(problem.startswith("/health") for problem in seen.problems)


def test_a_slow_server_is_a_gap() -> None:
    with running_stub(StubConfig(delay_s=0.05, tokens_per_frame=8)) as (url, _):
        began_s = time.perf_counter()
        seen = watch(url, num_streams=1)
    assert seen.max_gap_s >= 0.04
    assert began_s < seen.gaps[0].began_s < seen.gaps[0].ended_s < time.perf_counter()


def test_waits_for_a_turn_are_told_apart_from_pauses() -> None:
    seen = Seen()
    seen.add_gaps([Gap(0.0, 0.1 * (1 + number % 2), 0.0, number % 2) for number in range(100)])
    assert (seen.max_first_s, seen.max_gap_s) == (0.1, 0.2)
    assert len(seen.gaps) == 2 * MAX_GAPS


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (StubConfig(short_by=1), "63 tokens"),
        (StubConfig(spoil_every=5), "alone"),
        (StubConfig(break_every=5), ""),
    ],
)
def test_what_is_wrong_with_a_stream_is_seen(config: StubConfig, problem: str) -> None:
    with running_stub(config) as (url, _):
        problems = [text for text in watch(url).problems if not text.startswith("/health")]
    assert problems and problem in problems[0]


def test_a_server_that_fails_at_once_is_an_error() -> None:
    with (
        running_stub(StubConfig(fail_every=1)) as (url, _),
        pytest.raises(RuntimeError, match="one stream alone fails"),
    ):
        watch(url)


def test_a_process_that_is_woken_late_knows() -> None:
    lateness = Lateness()

    async def run() -> float:
        ticks = asyncio.create_task(lateness.run())
        await asyncio.sleep(0.05)
        began_s = time.perf_counter()
        time.sleep(0.2)  # as if the machine had no core for it
        await asyncio.sleep(0.05)
        ticks.cancel()
        return began_s

    began_s = asyncio.run(run())
    assert 0.1 < lateness.between(began_s, began_s + 0.2) < BUSY_S
    assert lateness.between(began_s + 1, began_s + 2) == 0
