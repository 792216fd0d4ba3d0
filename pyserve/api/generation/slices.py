"""Slices: lets work that must run on the event loop yield to other tasks in between."""

from __future__ import annotations

import asyncio
import time

SLICE_S = 0.01


class Slices:
    """Await `rest` after each small piece of work: once per SLICE_S it lets other tasks run."""

    def __init__(self) -> None:
        self._ends_s = time.monotonic() + SLICE_S

    async def rest(self) -> None:
        if time.monotonic() >= self._ends_s:
            await asyncio.sleep(0)
            self._ends_s = time.monotonic() + SLICE_S
