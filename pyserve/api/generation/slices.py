"""Work that has to be done on the event loop, cut into slices."""

from __future__ import annotations

import asyncio
import time

SLICE_S = 0.01


class Slices:
    """Await `rest` after each small part: every SLICE_S it lets other tasks run."""

    def __init__(self) -> None:
        self._ends_s = time.monotonic() + SLICE_S

    async def rest(self) -> None:
        if time.monotonic() >= self._ends_s:
            await asyncio.sleep(0)
            self._ends_s = time.monotonic() + SLICE_S
