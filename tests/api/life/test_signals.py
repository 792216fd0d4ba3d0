"""The first signal asks, the second ends: before there is a loop, while it runs, after its end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve.api.life.signals import StopSignals

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture(autouse=True)
def _hearing_hangups() -> Iterator[None]:
    """Whatever the suite itself was started with: under nohup the signal is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_a_first_signal_is_told_on_the_loop(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    async def test(signals: StopSignals) -> None:
        told = asyncio.Event()
        signals.watch(told.set)
        assert signals.first is None and not told.is_set()
        signal.raise_signal(number)
        await asyncio.wait_for(told.wait(), 30)
        signals.forget()

    with StopSignals() as signals:
        asyncio.run(test(signals))
        assert signals.first == number
    assert signal.getsignal(number) == before


def test_a_signal_before_the_loop_is_not_lost() -> None:
    async def test(signals: StopSignals) -> None:
        told = asyncio.Event()
        signals.watch(told.set)
        await asyncio.wait_for(told.wait(), 30)
        signals.forget()

    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        asyncio.run(test(signals))


def test_a_first_signal_after_the_loop_is_harmless() -> None:
    async def test(signals: StopSignals) -> None:
        signals.watch(lambda: None)
        signals.forget()

    with StopSignals() as signals:
        asyncio.run(test(signals))
        signal.raise_signal(signal.SIGINT)
        assert signals.first == signal.SIGINT


SECOND = """
import signal, time
from pyserve.api.life.signals import StopSignals
with StopSignals():
    signal.raise_signal(signal.{first})
    signal.raise_signal(signal.{second})
    print("still here")
"""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("SIGTERM", "SIGINT", 130), ("SIGINT", "SIGTERM", 143), ("SIGHUP", "SIGQUIT", 131)],
)
def test_a_second_signal_ends_whatever_runs(first: str, second: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECOND.format(first=first, second=second)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stdout == "" and done.stderr == "told to stop twice: exiting at once\n"


def test_the_end_of_a_terminal_may_be_told_more_than_once() -> None:
    """By the shell, and by the kernel: streams still get to their end."""
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert signals.first == signal.SIGHUP


def test_what_nohup_asks_for_is_kept() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.first is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
