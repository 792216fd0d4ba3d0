"""Progress of a start-up or a batch on stderr: a moving bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from pyserve import log
from pyserve.api.life.startup import Phase, Startup

BAR_INTERVAL_S = 0.2
LINE_INTERVAL_S = 5.0
BAR_CHARS = 30
IN_BYTES = ("download", "load")  # phases that count bytes; others count units of work
CLEAR_LINE = "\r\x1b[K"


class Shown(NamedTuple):
    """What to show: the progress from 0 to 1, None where it is unknown, and a line of text."""

    progress: float | None
    words: str

    def with_bar(self) -> str:
        """A bar that shows the progress, followed by the text."""
        filled = round(BAR_CHARS * (self.progress or 0.0))
        return f"[{'#' * filled + '.' * (BAR_CHARS - filled)}] {self.words}"


async def show_progress(startup: Startup) -> None:
    """Show the progress of a start-up until this is cancelled."""
    await show(lambda now_s: Shown(startup.phase.progress, describe(startup.phase, now_s)))


async def show(look: Callable[[float], Shown]) -> None:
    """Show what `look` returns for the present monotonic time, in s, until this is cancelled."""
    if sys.stderr.isatty():
        await _draw_bar(look)
    while True:
        await asyncio.sleep(LINE_INTERVAL_S)
        log.get_logger().info("%s", look(time.monotonic()).words)


def describe(phase: Phase, now_s: float) -> str:
    """A phase in one line, with as much as is known of it.

    For instance "load: 1.20 of 4.00 GB (30%), 900 MB/s, 3 s left", "build: 45%, 30 s left" or
    "start: 12 s so far".
    """
    is_in_bytes = phase.name in IN_BYTES
    if phase.progress is None or (not phase.done and not is_in_bytes):
        return f"{phase.name}: {now_s - phase.began_s:.0f} s so far"
    figures = [f"{phase.progress:.0%}"]
    speed, eta_s = phase.speed(now_s), phase.eta_s(now_s)
    if is_in_bytes:
        figures = [f"{phase.done / 1e9:.2f} of {phase.total / 1e9:.2f} GB ({phase.progress:.0%})"]
        if speed is not None:
            figures.append(f"{speed / 1e6:.0f} MB/s")
    if eta_s is not None:
        figures.append(f"{eta_s:.0f} s left")
    return f"{phase.name}: {', '.join(figures)}"


class _ClearsLine(logging.Handler):
    """Erases the bar before the next log handler writes its line."""

    def emit(self, record: logging.LogRecord) -> None:
        log.draw(CLEAR_LINE, is_optional=False)


async def _draw_bar(look: Callable[[float], Shown]) -> None:
    clears = _ClearsLine()
    log.get_logger().addHandler(clears)  # runs before the root logger's handlers
    try:
        while True:
            log.draw(CLEAR_LINE + look(time.monotonic()).with_bar())
            await asyncio.sleep(BAR_INTERVAL_S)
    finally:
        log.get_logger().removeHandler(clears)
        log.draw(CLEAR_LINE, is_optional=False)
