"""How a start shows its progress: one bar that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from pyserve import log
from pyserve.api.life.startup import Phase, Startup

BAR_INTERVAL_S = 0.2
LINE_INTERVAL_S = 5.0
BAR_CHARS = 30
IN_BYTES = ("download", "load")  # phases whose figures are bytes; others count shares of the work
CLEAR_LINE = "\r\x1b[K"


async def show_progress(startup: Startup) -> None:
    """Until it is cancelled, on stderr."""
    if sys.stderr.isatty():
        await _draw_bar(startup)
    while True:
        await asyncio.sleep(LINE_INTERVAL_S)
        log.get_logger().info("%s", describe(startup.phase, time.monotonic()))


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


def draw(phase: Phase, now_s: float) -> str:
    """The same after a bar."""
    filled = round(BAR_CHARS * (phase.progress or 0.0))
    bar = "#" * filled + "." * (BAR_CHARS - filled)
    return f"[{bar}] {describe(phase, now_s)}"


class _ClearsLine(logging.Handler):
    """Takes the bar away before the line of the handler after it."""

    def emit(self, record: logging.LogRecord) -> None:
        log.draw(CLEAR_LINE, is_optional=False)


async def _draw_bar(startup: Startup) -> None:
    clears = _ClearsLine()
    log.get_logger().addHandler(clears)  # comes before the root's
    try:
        while True:
            log.draw(CLEAR_LINE + draw(startup.phase, time.monotonic()))
            await asyncio.sleep(BAR_INTERVAL_S)
    finally:
        log.get_logger().removeHandler(clears)
        log.draw(CLEAR_LINE, is_optional=False)
