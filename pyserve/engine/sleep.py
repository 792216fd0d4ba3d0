"""Sleep mode: whether an engine is awake or asleep, and the memory that it frees while asleep.

While an engine sleeps no step runs, and submitted requests wait in the queue. On a CPU, level 1
frees the KV cache and keeps the weights, and level 2 frees both. On a card both levels free both:
the files' pages that the kernel keeps in its page cache make reading the weights again fast.
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

AWAKE, WEIGHTS_KEPT, ALL_GONE = 0, 1, 2  # the levels

_Result = TypeVar("_Result")


class Sleeper(Protocol):
    """Frees and restores memory. Both calls block: they run on a thread while no step runs."""

    def sleep(self, level: int) -> None:
        """Free the memory that `level` frees. Harmless for what has been freed already."""

    def wake_up(self) -> None:
        """Allocate and load everything again. Raises what loading raises."""


class Weights:
    """Restores the model of an executor after StepExecutor.drop_model.

    load          reads the weights and returns the model.
    wait_loaded   waits until all other ranks have reported that they have loaded theirs.
    """

    def __init__(
        self, executor: StepExecutor, load: Callable[[], Decoder], wait_loaded: Callable[[], None]
    ) -> None:
        self._executor = executor
        self._load = load
        self._wait_loaded = wait_loaded

    def take(self) -> None:
        """Load the model on all ranks if it was dropped. Raises what loading raises."""
        if self._executor.has_model:
            return
        try:
            self._executor.take_model(self._load)
        finally:  # the other ranks report even if loading failed on this one
            self._wait_loaded()


class HostSleeper:
    """The Sleeper of an engine on a CPU."""

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
    """The Sleeper of an engine on a card.

    Both levels free all device memory but the CUDA context and loaded code. Even at level 1 we keep
    no copy of the weights in host memory: it would have to be page-locked to come back faster than
    the loader reads the files from the page cache, which takes seconds for an 8B model.

    try_out   runs one sequence through the whole engine, as the last part of a start does.
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
        """Restore everything in the order of a start: the largest step runs before the KV cache is
        allocated, so that the memory that steps need is taken first."""
        self._weights.take()
        self._runner.warm_up_largest()
        self._runner.allocate_kv(self._num_blocks)
        self._try_out()


class Sleep:
    """The sleep state of one engine. All methods run on its event loop.

    sleeper  frees and restores the memory; None: this engine cannot sleep.
    idle_s   seconds without work after which the engine falls asleep by itself; 0: never.
    level    the level that it is at.
    wanted   the level that it should go to.
    failure  why its last attempt to wake up failed. It then sleeps on at level 2, and may be asked
             to wake up again.
    """

    def __init__(self, sleeper: Sleeper | None = None, *, idle_s: float = 0.0) -> None:
        self.level = self.wanted = AWAKE
        self.failure: str | None = None
        self._sleeper = sleeper
        self._idle_s = idle_s if sleeper is not None else 0.0
        self._is_by_itself = False
        self._waiting: list[asyncio.Future[None]] = []

    def want(self, level: int) -> None:
        """Set the level to go to, at a user's request."""
        assert self._sleeper is not None
        self.wanted, self._is_by_itself, self.failure = level, False, None
        self.tell()

    def note_work(self) -> None:
        """A request was submitted: wake up for it if the engine had fallen asleep by itself."""
        if self._is_by_itself:
            self.wanted = AWAKE
            self.tell()

    @property
    def has_failed_work(self) -> bool:
        """Whether the engine tried to wake up for submitted requests alone, and failed."""
        return self.failure is not None and self._is_by_itself

    async def wait_for_work(self, wakeup: asyncio.Event) -> None:
        """Wait until `wakeup` is set; after idle_s seconds want to sleep at level 2 instead."""
        try:
            await asyncio.wait_for(wakeup.wait(), self._idle_s or None)
        except asyncio.TimeoutError:
            if not wakeup.is_set():
                self.wanted, self._is_by_itself = ALL_GONE, True

    async def go(self) -> None:
        """Go to the level that is wanted.

        A level that is deeper than the present one, or AWAKE, is reached at once. Going from level
        2 to level 1 does nothing, as that takes waking up first. If waking up fails for a reason
        that may pass, the reason is kept in `failure`; other exceptions of the Sleeper are raised.
        """
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
        """Whether it is awake and is to stay so."""
        return self.level == self.wanted == AWAKE

    @property
    def is_behind(self) -> bool:
        """Whether `go` would do something."""
        return self.wanted > self.level or (self.wanted == AWAKE and self.level != AWAKE)

    def is_on_its_way(self, level: int) -> bool:
        """Whether `level` is still wanted and has not been reached yet."""
        return self.wanted == level and self.is_behind

    async def news(self) -> None:
        """Wait until the next call of `tell`."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def tell(self) -> None:
        """Wake all callers of `news`, because the state has changed."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _say(self, level: int, what: str, began_s: float) -> None:
        self.level = level
        self.tell()
        log.get_logger().info("%s, after %.2f s", what, time.monotonic() - began_s)


def _wake_up(sleeper: Sleeper) -> str | None:
    """Wake up; returns None on success, else the reason, after freeing all memory again."""
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
    # Outside of the `except` blocks: the exception's traceback keeps the new tensors alive.
    sleeper.sleep(ALL_GONE)
    return failure


async def _on_a_thread(call: Callable[[], _Result]) -> _Result:
    """Run `call` on a new thread. Libraries keep resources for each thread, as torch its cuBLAS
    handles and workspaces; when the thread ends, they are free for the next one."""
    with ThreadPoolExecutor(1, "sleep") as threads:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
