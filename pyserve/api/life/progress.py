"""Progress of a start, or of a batch: one bar that moves on a terminal, plain lines elsewhere."""

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
IN_BYTES = ("download", "load")  # phases whose figures are bytes; others count shares of the work
CLEAR_LINE = "\r\x1b[K"


class Shown(NamedTuple):
    """What a line says: how far it is, 0 to 1 and None where that is unknown, and words."""

    progress: float | None
    words: str

    def with_bar(self) -> str:
        """The words after a bar."""
        filled = round(BAR_CHARS * (self.progress or 0.0))
        return f"[{'#' * filled + '.' * (BAR_CHARS - filled)}] {self.words}"


async def show_progress(startup: Startup) -> None:
    """Of a start, until it is cancelled, on stderr."""
    await show(lambda now_s: Shown(startup.phase.progress, describe(startup.phase, now_s)))


async def show(look: Callable[[float], Shown]) -> None:
    """What `look` says at a time, in monotonic seconds; until it is cancelled, on stderr."""
    if sys.stderr.isatty():
        await _draw_bar(look)
    while True:
        await asyncio.sleep(LINE_INTERVAL_S)
        log.get_logger().info("%s", look(time.monotonic()).words)


def describe(phase: Phase, now_s: float) -> str:
    """One line: "load: 1.20 of 4.00 GB (30%), 900 MB/s, 3 s left"; "build: 45%, 30 s left";
    "start: 12 s so far"."""
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
    """Takes the bar away before the line of the handler after it."""

    def emit(self, record: logging.LogRecord) -> None:
        log.draw(CLEAR_LINE, is_optional=False)


async def _draw_bar(look: Callable[[float], Shown]) -> None:
    clears = _ClearsLine()
    log.get_logger().addHandler(clears)  # comes before the root's
    try:
        while True:
            log.draw(CLEAR_LINE + look(time.monotonic()).with_bar())
            await asyncio.sleep(BAR_INTERVAL_S)
    finally:
        log.get_logger().removeHandler(clears)
        log.draw(CLEAR_LINE, is_optional=False)
