"""What the handlers of one server share: its phase of life, the model, metrics, text threads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from aiohttp import web

from pyserve.api.keys import CLIENT, Keys
from pyserve.api.request_log import RequestLog
from pyserve.api.text_queue import TextQueue
from pyserve.api.uploads import Uploads
from pyserve.api.watchdog import LoopWatchdog
from pyserve.client import EngineClient
from pyserve.config import ServerConfig
from pyserve.errors import NotFoundError, UnavailableError
from pyserve.log import get_logger
from pyserve.metrics import Metrics
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer

MAX_RETRY_AFTER_S = 60
SHORT_TEXT_CHARS = 4000  # tokenised on the event loop: about a millisecond

Report = Callable[[str, int, int], None]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load` hands over: all the API needs of a model. The engine is not started yet."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    defaults: GenerationDefaults
    engine: EngineClient


@dataclass(frozen=True, slots=True)
class Phase:
    """Where the start-up stands; replaced as a whole, so that any thread may read it."""

    name: str
    done: int
    total: int  # 0: unknown
    began_s: float
    counted_s: float | None = None  # when nothing of `total` was done; None: when it began

    @property
    def progress(self) -> float | None:
        """0 to 1; None where the total is unknown."""
        return min(self.done / self.total, 1.0) if self.total > 0 else None

    def speed(self, now_s: float) -> float | None:
        """What is done in a second, on average; None where it is unknown."""
        since_s = self.began_s if self.counted_s is None else self.counted_s
        if self.total <= 0 or self.done <= 0 or now_s <= since_s:
            return None
        return self.done / (now_s - since_s)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds to the end of this phase at the speed so far."""
        speed = self.speed(now_s)
        return None if speed is None else round(max(self.total - self.done, 0) / speed, 1)


class StopLoading(BaseException):
    """Raised by a report to the thread that loads: the server is told to stop, end what runs."""


class Startup:
    """Phases of the start-up, told by the loading thread, shown by the event loop.

    The first begins with the process, so that their sum is what the user has waited.
    """

    def __init__(self) -> None:
        began_s = time.monotonic() - _process_age_s()
        self._began_s = began_s
        self._seconds: dict[str, float] = {}  # of the phases that have ended, in their order
        self.phase = Phase("start", 0, 0, began_s)
        self._is_given_up = False

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def explain(self) -> str:
        """Where the time has gone: "start 0.9 + build 0.1 + load 1.0 = 2.0 s"."""
        parts = [f"{name} {seconds:.1f}" for name, seconds in self._seconds.items()]
        return f"{' + '.join(parts)} = {sum(self._seconds.values()):.1f} s"

    def describe(self) -> dict[str, object]:
        """Phase, progress in it (0 to 1) and seconds to its end, null where unknown."""
        phase = self.phase
        return {
            "phase": phase.name,
            "progress": phase.progress,
            "eta_s": phase.eta_s(time.monotonic()),
        }

    def report(self, name: str, done: int, total: int) -> None:
        """Called by one thread at a time; a new name ends the phase before it.

        A report of nothing done starts the clock by which the speed is told. Raises StopLoading
        once the start is given up.
        """
        if self._is_given_up:
            raise StopLoading
        phase, now = self.phase, time.monotonic()
        if name != phase.name:
            self._end(phase, now)
            phase = Phase(name, done, total, now)
        counted_s = phase.counted_s if done else now
        self.phase = replace(phase, done=done, total=total, counted_s=counted_s)

    def give_up(self) -> None:
        """The next report raises: whoever loads lets go of what it holds."""
        self._is_given_up = True

    def finish(self) -> None:
        """End the last phase."""
        self._end(self.phase, time.monotonic())

    def _end(self, phase: Phase, now_s: float) -> None:
        took_s = now_s - phase.began_s
        self._seconds[phase.name] = self._seconds.get(phase.name, 0.0) + took_s
        get_logger().info("%s: %.1f s", phase.name, took_s)


def _process_age_s() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started_s, 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


@dataclass(slots=True, eq=False)
class ServerState:
    """Owned by serve.py, which alone moves `status` on; read by every handler."""

    config: ServerConfig
    metrics: Metrics
    startup: Startup = field(default_factory=Startup)
    watchdog: LoopWatchdog = field(init=False)
    status: Literal["starting", "ready", "draining", "failed"] = "starting"
    loaded: Loaded | None = None
    num_in_flight: int = 0  # requests that use the model
    uploads: Uploads = field(default_factory=Uploads)
    request_log: RequestLog = field(init=False)
    keys: Keys = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _text_queue: TextQueue = field(default_factory=TextQueue)

    def __post_init__(self) -> None:
        self.watchdog = LoopWatchdog(lambda: self.num_in_flight)
        self.request_log = RequestLog(log_arrivals=self.config.log_requests)
        self.keys = Keys(self.config.api_keys, is_shared=self.config.share_prefix_cache)

    @property
    def model_name(self) -> str:
        """The name in responses and metrics."""
        return self.config.served_model_names[0]

    def model(self) -> Loaded:
        """The model, for a new request. Raises UnavailableError in any phase but ready."""
        if self.status == "draining":
            raise UnavailableError("the server is shutting down")
        if self.status == "failed":
            raise UnavailableError("the engine has stopped, and the server with it")
        if self.loaded is None or self.status == "starting":
            phase = self.startup.phase
            eta_s = phase.eta_s(time.monotonic())
            percent = "" if phase.progress is None else f", {phase.progress:.0%}"
            raise UnavailableError(
                f"the server is starting (phase {phase.name}{percent})",
                max(1, min(int(eta_s or 1), MAX_RETRY_AFTER_S)),
            )
        return self.loaded

    def model_with_room(self, request: web.Request) -> Loaded:
        """As `model`; raises QueueFullError where not one more sequence of its client may wait.

        Asked before a body is read, so that a refusal costs next to nothing.
        """
        loaded = self.model()
        loaded.engine.check_room(1, user=request[CLIENT])
        return loaded

    def check_model_name(self, name: str | None) -> None:
        """Refuse a name that is not served; none means the served one."""
        if name and name not in self.config.served_model_names:
            raise NotFoundError(f"The model `{name[:200]}` does not exist.", "model")

    def enter(self) -> None:
        """A request that uses the model begins."""
        self.num_in_flight += 1

    def leave(self) -> None:
        """It has ended, however it did."""
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Until no request uses the model; False where it takes longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.num_in_flight:
            self._idle.clear()
            try:
                await asyncio.wait_for(self._idle.wait(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                return False
        return True

    async def run_text(
        self,
        request: web.Request,
        size: int,
        function: Callable[[], R],
        *,
        short: int = SHORT_TEXT_CHARS,
        is_answer: bool = False,
    ) -> R:
        """Run text work on `size` bytes, characters or tokens: on a thread where it would block.

        is_answer  it ends the request, and is not refused where too much waits.

        Raises QueueFullError, and what `function` raises.
        """
        if size <= short:
            return function()
        return await self._text_queue.run(
            function, client=request[CLIENT], num_bytes=size, is_answer=is_answer
        )

    def close(self) -> None:
        """Let go of the threads; what they still do is not waited for."""
        self._text_queue.close()


STATE = web.AppKey("state", ServerState)
