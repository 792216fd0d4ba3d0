"""Sleep: whether an engine is awake, who wants it otherwise, and the memory that it gives back.

While it sleeps no step runs; what is submitted waits in the queue. At level 1 the KV cache is gone
and the weights stay in the host's memory; at level 2 they are gone as well and are read again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from pyserve import allocator, log
from pyserve.engine.executor import StepExecutor
from pyserve.model.decoder import Decoder

AWAKE, WEIGHTS_KEPT, ALL_GONE = 0, 1, 2


class Sleeper(Protocol):
    """Both take their time, on a thread, while no step is in flight."""

    def sleep(self, level: int) -> None:
        """Give back the memory of a level; harmless where it has been."""

    def wake_up(self) -> None:
        """Make all of it again. Raises what loading raises."""


class HostSleeper:
    """On a CPU: `load` makes the model of `executor` again."""

    def __init__(
        self, executor: StepExecutor, num_blocks: int, load: Callable[[], Decoder]
    ) -> None:
        self._executor = executor
        self._num_blocks = num_blocks
        self._load = load

    def sleep(self, level: int) -> None:
        self._executor.free_kv()
        if level == ALL_GONE:
            self._executor.drop_model()
        allocator.trim()

    def wake_up(self) -> None:
        self._executor.take_model(self._load)
        self._executor.allocate_kv(self._num_blocks)


class Sleep:
    """Of one engine, on its event loop.

    sleeper  None: it cannot sleep.
    idle_s   it falls asleep by itself when it had nothing to do for so long; 0: never.
    level    that it has reached; wanted: that it is on its way to.
    """

    def __init__(self, sleeper: Sleeper | None = None, *, idle_s: float = 0.0) -> None:
        self.level = self.wanted = AWAKE
        self._sleeper = sleeper
        self._idle_s = idle_s if sleeper is not None else 0.0
        self._is_by_itself = False
        self._waiting: list[asyncio.Future[None]] = []

    def want(self, level: int) -> None:
        """From here on it is on its way to `level`, because somebody has asked for it."""
        assert self._sleeper is not None
        self.wanted, self._is_by_itself = level, False
        self.tell()

    def note_work(self) -> None:
        """Something was submitted: who fell asleep by itself wakes up for it."""
        if self._is_by_itself:
            self.want(AWAKE)

    async def wait_for_work(self, wakeup: asyncio.Event) -> None:
        """Until `wakeup` is set, or it has waited so long that it wants to sleep."""
        try:
            await asyncio.wait_for(wakeup.wait(), self._idle_s or None)
        except asyncio.TimeoutError:
            if not wakeup.is_set():
                self.wanted, self._is_by_itself = ALL_GONE, True

    async def go(self) -> None:
        """To where it is wanted; from a deeper level to another only by waking up."""
        wanted, began_s = self.wanted, time.monotonic()
        assert self._sleeper is not None
        if wanted == AWAKE and self.level != AWAKE:
            await asyncio.to_thread(self._sleeper.wake_up)
            self._say(AWAKE, "awake again", began_s)
        elif wanted > self.level:
            await asyncio.to_thread(self._sleeper.sleep, wanted)
            self._say(wanted, f"asleep at level {wanted}", began_s)

    @property
    def is_awake(self) -> bool:
        """And is to stay so."""
        return self.level == self.wanted == AWAKE

    @property
    def is_behind(self) -> bool:
        """Whether `go` would do something."""
        return self.wanted > self.level or (self.wanted == AWAKE and self.level != AWAKE)

    def is_on_its_way(self, level: int) -> bool:
        """Whether it is wanted at `level` still, and there is something to do for it."""
        return self.wanted == level and self.is_behind

    async def news(self) -> None:
        """Wait until something of this has changed."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def tell(self) -> None:
        """Let all who wait look again."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _say(self, level: int, what: str, began_s: float) -> None:
        self.level = level
        self.tell()
        log.get_logger().info("%s, after %.2f s", what, time.monotonic() - began_s)
