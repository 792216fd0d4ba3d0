"""How a start shows its progress: one bar that moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from pyserve import log
from pyserve.api.state import Phase, Startup

BAR_INTERVAL_S = 0.2
LINE_INTERVAL_S = 5.0
BAR_CHARS = 30
MIN_BYTES = 10_000  # totals below are not bytes: such a phase is shown without a figure
CLEAR_LINE = "\r\x1b[K"


async def show_progress(startup: Startup) -> None:
    """Until it is cancelled, on stderr."""
    if sys.stderr.isatty():
        await _draw_bar(startup)
    while True:
        await asyncio.sleep(LINE_INTERVAL_S)
        log.get_logger().info("%s", describe(startup.phase, time.monotonic()))


def describe(phase: Phase, now_s: float) -> str:
    """One line: "load: 1.20 of 4.00 GB (30%), 900 MB/s, 3 s left"; "build: 12 s so far"."""
    if phase.progress is None or phase.total < MIN_BYTES:
        return f"{phase.name}: {now_s - phase.began_s:.0f} s so far"
    eta_s = phase.eta_s(now_s)
    rest = ""
    if eta_s is not None:
        rest = (
            f", {phase.done / 1e6 / max(now_s - phase.began_s, 1e-3):.0f} MB/s, {eta_s:.0f} s left"
        )
    return (
        f"{phase.name}: {phase.done / 1e9:.2f} of {phase.total / 1e9:.2f} GB "
        f"({phase.progress:.0%}){rest}"
    )


def draw(phase: Phase, now_s: float) -> str:
    """The same after a bar."""
    progress = phase.progress if phase.total >= MIN_BYTES else None
    filled = round(BAR_CHARS * (progress or 0.0))
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
