"""Sleep: whether an engine is awake, who wants it otherwise, and the memory that it gives back.

While it sleeps no step runs; what is submitted waits in the queue. At level 1 the KV cache is gone
and the weights stay in the host's memory; at level 2 they are gone as well and are read again. Of a
card's weights it is the page cache that keeps them, at either level.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from pyserve import allocator, log
from pyserve.engine import devices
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.executor import StepExecutor
from pyserve.errors import StartupError
from pyserve.model.decoder import Decoder

AWAKE, WEIGHTS_KEPT, ALL_GONE = 0, 1, 2

_Result = TypeVar("_Result")


class Sleeper(Protocol):
    """Both take their time, on a thread, while no step is in flight."""

    def sleep(self, level: int) -> None:
        """Give back the memory of a level; harmless where it has been."""

    def wake_up(self) -> None:
        """Make all of it again. Raises what loading raises."""


class Weights:
    """The model of an executor, which `load` makes again where it was dropped.

    wait_loaded   until all other ranks have told that they have loaded theirs.
    """

    def __init__(
        self, executor: StepExecutor, load: Callable[[], Decoder], wait_loaded: Callable[[], None]
    ) -> None:
        self._executor = executor
        self._load = load
        self._wait_loaded = wait_loaded

    def take(self) -> None:
        if self._executor.has_model:
            return
        try:
            self._executor.take_model(self._load)
        finally:  # they tell it, whatever has come of this rank's
            self._wait_loaded()


class HostSleeper:
    """On a CPU."""

    def __init__(self, executor: StepExecutor, weights: Weights, num_blocks: int) -> None:
        self._executor = executor
        self._weights = weights
        self._num_blocks = num_blocks

    def sleep(self, level: int) -> None:
        self._executor.free_kv()
        if level == ALL_GONE:
            self._executor.drop_model()
        allocator.trim()

    def wake_up(self) -> None:
        self._weights.take()
        self._executor.allocate_kv(self._num_blocks)


class CardSleeper:
    """On a card, of which all is given back at either level but the CUDA context and loaded code.

    A copy of the weights in the host's memory would have to be page-locked to come back faster than
    the loader reads the files out of the page cache, which takes seconds for an 8B model. So what
    keeps them there is the page cache.

    try_out   runs a sequence through all parts, as a start does last.
    """

    def __init__(
        self, executor: StepExecutor, weights: Weights, num_blocks: int, runner: CudaRunner,
        try_out: Callable[[], None],
    ) -> None:  # fmt: skip
        self._executor = executor
        self._weights = weights
        self._num_blocks = num_blocks
        self._runner = runner
        self._try_out = try_out

    def sleep(self, level: int) -> None:
        self._executor.free_kv()
        self._executor.drop_model()
        allocator.trim()
        used_bytes = devices.card_memory(self._executor.device).used_bytes
        log.get_logger().info("the card shows %.2f GB in use", used_bytes / 1e9)

    def wake_up(self) -> None:
        """As at the start: the largest step takes what steps take beside the KV cache, first."""
        self._weights.take()
        self._runner.warm_up_largest()
        self._runner.allocate_kv(self._num_blocks)
        self._try_out()


class Sleep:
    """Of one engine, on its event loop.

    sleeper  None: it cannot sleep.
    idle_s   it falls asleep by itself when it had nothing to do for so long; 0: never.
    level    that it has reached; wanted: that it is on its way to.
    failure  why it could not wake up when it last should: it sleeps on, at level 2, and may be
             asked again.
    """

    def __init__(self, sleeper: Sleeper | None = None, *, idle_s: float = 0.0) -> None:
        self.level = self.wanted = AWAKE
        self.failure: str | None = None
        self._sleeper = sleeper
        self._idle_s = idle_s if sleeper is not None else 0.0
        self._is_by_itself = False
        self._waiting: list[asyncio.Future[None]] = []

    def want(self, level: int) -> None:
        """From here on it is on its way to `level`, because somebody has asked for it."""
        assert self._sleeper is not None
        self.wanted, self._is_by_itself, self.failure = level, False, None
        self.tell()

    def note_work(self) -> None:
        """Something was submitted: who fell asleep by itself wakes up for it."""
        if self._is_by_itself:
            self.wanted = AWAKE
            self.tell()

    @property
    def has_failed_work(self) -> bool:
        """Whether nobody but what was submitted has asked to wake up, and in vain."""
        return self.failure is not None and self._is_by_itself

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
        sleeper = self._sleeper
        assert sleeper is not None
        if wanted == AWAKE and self.level != AWAKE:
            self.failure = await _on_a_thread(lambda: _wake_up(sleeper))
            if self.failure is not None:
                log.get_logger().error("still asleep: %s", self.failure)
                self.level = self.wanted = ALL_GONE
                self.tell()
                return
            self._is_by_itself = False
            self._say(AWAKE, "awake again", began_s)
        elif wanted > self.level:
            await _on_a_thread(lambda: sleeper.sleep(wanted))
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


def _wake_up(sleeper: Sleeper) -> str | None:
    """Why it could not, with all memory given back again; None: it could."""
    try:
        sleeper.wake_up()
        return None
    except StartupError as error:
        failure = str(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        failure = (
            "the memory is not there any more, other processes have taken it: see nvidia-smi, and "
            "ask again when it is free"
        )
    # Not before here: the error holds what was made until it was raised.
    sleeper.sleep(ALL_GONE)
    return failure


async def _on_a_thread(call: Callable[[], _Result]) -> _Result:
    """A new one each time: what libraries keep for a thread, as cuBLAS its handles and their memory
    on a card, is the next one's when it has ended."""
    with ThreadPoolExecutor(1, "sleep") as threads:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
