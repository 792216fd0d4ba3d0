"""AsyncEngine: the engine on the event loop. Implements client.EngineClient.

One task launches steps and awaits their results in order. Requests arrive and tokens are delivered
while it awaits, all on the event loop's one thread. The task runs ahead of the device: besides the
step whose result it awaits, up to `_depth` later steps may already be launched.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from pyserve import log
from pyserve.client import AdapterStore, EngineInfo, EngineStats, SequenceRequest, SequenceStream
from pyserve.engine.batch import Step, StepOutput
from pyserve.engine.engine import Engine, Pending
from pyserve.engine.masks import MaskWorkers
from pyserve.engine.queue_bound import Load, QueueBound
from pyserve.engine.sleep import AWAKE, Sleep
from pyserve.engine.tensor_parallel.followers import Followers
from pyserve.engine.tensor_parallel.launched import LaunchedFollowers
from pyserve.engine.trace import Trace
from pyserve.errors import DeviceError, EngineError, RequestError, UnavailableError
from pyserve.host import num_threads
from pyserve.words import counted

MAX_FAILED_STEPS = 3  # after this many failed steps in a row the engine stops
MAX_MASKS_S = 0.004  # how long the event loop may block until masks are filled
WAKE_AGAIN_S = 10  # Retry-After of a request that found the engine unable to wake up
LOOK_S = 1.0  # interval at which the running step's age is checked against its deadline


@dataclass(slots=True, eq=False)
class _Launched:
    """A step in flight. `result` is None while its sampling waits for masks. No later step is
    launched meanwhile, so only the last step in flight can be in that state."""

    step: Step
    pending: Pending
    result: asyncio.Future[StepOutput] | None


class AsyncEngine:
    """All methods run on the event loop that calls `start`.

    `_task` is None until `start`. Once `_refusal` is set, the engine accepts nothing and is ending
    or has ended; if `_error` is set too, it has given up after a failure. The runner is closed when
    `_task` ends, unless the GPU is lost.

    trace      receives the time spans of --trace; closed when the engine ends.
    sleep      state of sleep mode; None: the engine cannot sleep.
    adapters   LoRA adapters that are served beside the base model; None: there are none.
    followers  the other ranks of a model that several ranks share; losing one ends the engine.
    """

    def __init__(
        self, engine: Engine, info: EngineInfo, trace: Trace | None = None,
        sleep: Sleep | None = None, adapters: AdapterStore | None = None,
        followers: Followers | LaunchedFollowers | None = None,
    ) -> None:  # fmt: skip
        self.adapters = adapters
        self._followers = followers
        self._sleep = sleep or Sleep()
        self._engine = engine
        self._trace = trace
        self._info = info
        self._depth = engine.runner.run_ahead_depth
        self._queue = QueueBound(max_queue=info.max_queue, num_slots=info.max_num_seqs)
        self._masks = MaskWorkers(num_threads(), info.vocab_size)
        self._in_flight: deque[_Launched] = deque()
        self._next_step: Step | None = None  # scheduled and not launched yet
        self._step_start_s = 0.0  # when the oldest step in flight began to run
        self._looked_s = 0.0  # when its age was last checked
        self._num_failed_steps = 0
        self._is_device_lost = False
        self._wakeup = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._refusal: str | None = None  # why requests are refused from now on; set once
        self._error: str | None = None
        if trace is not None:
            trace.watch(engine, "schedule", "schedule")
            trace.watch(self, "_launch_step", "launch")
            trace.watch(engine, "update", "update")
            trace.watch(self._masks, "fill_rows", "mask")
        self._has_given_up = asyncio.Event()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def start(self) -> None:
        if self._task is not None or self._refusal is not None:
            raise RuntimeError("an engine is started once")
        self._start()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._engine.runner.attach(loop)
        self._looked_s = time.monotonic()
        self._look(loop)
        if self._followers is not None:
            self._followers.watch(lambda why: loop.call_soon_threadsafe(self._on_lost, why))
        self._task = loop.create_task(self._run(), name="engine")

    async def stop(self) -> None:
        self._shut("the server is shutting down", UnavailableError)
        if self._task is None:
            self._start()  # the task is what closes the runner
        assert self._task is not None
        await self._task

    async def wait_stopped(self) -> str:
        await self._has_given_up.wait()
        assert self._error is not None
        return self._error

    def check_room(self, num_sequences: int, *, num_tokens: int = 0, user: str = "") -> None:
        if self._refusal is not None:
            raise UnavailableError(self._refusal)
        engine = self._engine
        self._queue.check(
            Load(num_sequences, num_tokens),
            load_of=engine.load_of,
            load=engine.load,
            user=user,
            num_waiting=len(engine.scheduler.waiting),
            num_finished=engine.num_finished,
        )

    def submit(self, request: SequenceRequest) -> SequenceStream:
        self.check_room(1, num_tokens=len(request.prompt_token_ids), user=request.user)
        stream = self._engine.add(request)
        self._sleep.note_work()
        self._wakeup.set()
        return stream

    def abort(self, stream: SequenceStream) -> None:
        self._engine.abort(stream)

    def reset_prefix_cache(self) -> None:
        self._engine.scheduler.blocks.forget()

    async def sleep(self, level: int) -> None:
        await self._move(level)

    async def wake_up(self) -> None:
        await self._move(AWAKE)

    async def _move(self, level: int) -> None:
        if self._refusal is None:
            self._sleep.want(level)
            self._wakeup.set()
            while self._refusal is None and self._sleep.is_on_its_way(level):
                await self._sleep.news()
        if self._refusal is not None:
            raise UnavailableError(self._refusal)
        if level == AWAKE and self._sleep.failure is not None:
            raise _still_asleep(self._sleep.failure)

    def stats(self) -> EngineStats:
        scheduler = self._engine.scheduler
        num_blocks_used = scheduler.blocks.num_blocks - scheduler.blocks.num_free
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            # Ending the engine fails all sequences without updating the block manager's books.
            num_blocks_used=num_blocks_used if self._refusal is None else 0,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._engine.num_steps,
            prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            output_tokens=self._engine.num_output_tokens,
            step_age_s=time.monotonic() - self._step_start_s if self._in_flight else 0.0,
            error=self._error,
            step_deadline_s=self._engine.runner.step_deadline_s,
            num_device_allocations=self._engine.runner.num_device_allocations,
            num_awaiting=scheduler.num_awaiting,
            num_nan_sequences=self._engine.num_nan_sequences,
            steps=self._engine.histograms,
            sleep_level=self._sleep.level,
            running_adapters=tuple(scheduler.adapters.running),
            waiting_adapters=tuple(scheduler.waiting_adapters()),
            num_adapter_loads=scheduler.adapters.num_loads,
            num_adapter_reads=self.adapters.num_loads if self.adapters is not None else 0,
        )

    async def _run(self) -> None:
        try:
            while self._refusal is None:
                if self._sleep.wanted and not self._in_flight and self._next_step is None:
                    await self._rest()
                    continue
                self._launch()
                if self._waits_for_masks(0):
                    await self._mask_and_sample()
                elif self._in_flight:
                    await self._finish_step()
                    is_running = self._in_flight and not self._waits_for_masks(0)
                    if self._engine.has_first_tokens and is_running:
                        # Deliver first tokens before the next launch. This delays no work of the
                        # device: the step that it runs has only just begun.
                        await self._deliver()
                    self._launch(is_delivery_due=True)
                    if self._in_flight and not self._waits_for_masks(0):
                        # The device is busy with the next step: deliver tokens now, before a launch
                        # that takes milliseconds blocks the event loop.
                        await self._deliver()
                else:
                    assert not self._engine.num_seqs, "sequences wait and nothing can run"
                    self._wakeup.clear()
                    await self._sleep.wait_for_work(self._wakeup)
        except Exception as error:  # a bug of ours: the engine's state cannot be trusted any more
            log.get_logger().exception("the engine has stopped")
            self._give_up(f"the engine has stopped: {type(error).__name__}")
        if self._trace is not None:
            self._trace.close()
        self._masks.close()
        if self._is_device_lost:
            # No step ends on a lost device and none of its memory can be freed, so the runner is
            # not closed: the process must end.
            for launched in self._in_flight:
                if launched.result is not None and not launched.result.cancel():
                    launched.result.exception()  # asyncio logs exceptions that are never retrieved
            if self._followers is not None:
                self._followers.kill()
            return
        results = [launched.result or launched.pending.sample() for launched in self._in_flight]
        await asyncio.gather(*results, return_exceptions=True)
        self._in_flight.clear()
        self._engine.runner.close()
        if self._followers is not None:
            await asyncio.to_thread(self._followers.close)

    async def _rest(self) -> None:
        """Stay in sleep mode until the engine is to be awake again; no step is in flight."""
        self._engine.scheduler.preempt_all()
        while self._refusal is None:
            try:
                await self._sleep.go()
            except DeviceError as error:
                self._on_lost_device(f"falling asleep or waking up failed: {error}", str(error))
                return
            if self._sleep.is_awake:
                return
            if self._sleep.has_failed_work:
                # Only the waiting sequences had asked to wake up, so nobody would ask again.
                self._engine.fail_waiting(_still_asleep(self._sleep.failure))
            if not self._sleep.is_behind:
                self._wakeup.clear()
                await self._wakeup.wait()

    def _schedule(self) -> Step | None:
        return None if self._sleep.wanted else self._engine.schedule()

    def _launch(self, *, is_delivery_due: bool = False) -> None:
        """Launch steps until `_depth` of them are ahead or there is nothing to run.

        Nothing is launched behind a step that waits for its masks.

        is_delivery_due   tokens wait to be delivered: a step that has no CUDA graph, and so takes
                          long to launch, is left for the next call.
        """
        while len(self._in_flight) <= self._depth and not self._waits_for_masks(-1):
            step = self._next_step or self._schedule()
            if step is None:
                return
            if is_delivery_due and not self._engine.runner.is_replayed(step):
                self._next_step = step
                return
            self._next_step = None
            if not self._in_flight:
                self._step_start_s = time.monotonic()
            self._in_flight.append(self._launch_step(step))

    def _launch_step(self, step: Step) -> _Launched:
        pending = self._engine.runner.launch(step)
        if self._engine.is_host_dependent(step):
            return _Launched(step, pending, None)
        return _Launched(step, pending, pending.sample())

    def _waits_for_masks(self, index: int) -> bool:
        """Whether the step in flight at `index` (0: oldest, -1: newest) waits for its masks."""
        return bool(self._in_flight) and self._in_flight[index].result is None

    async def _mask_and_sample(self) -> None:
        """Fill the masks of the oldest step and launch its sampling; all earlier tokens are known.

        The device waits for the masks, so the event loop blocks for them for up to MAX_MASKS_S.
        If they take longer, it delivers tokens meanwhile.
        """
        launched = self._in_flight[0]
        filling = self._masks.fill(launched.step, launched.pending.bitmask)
        is_delivered = not filling.is_soon_over(MAX_MASKS_S)
        if is_delivered:
            await self._deliver()
        if self._refusal is None and len(self._in_flight) <= self._depth:
            # Schedule the next step now, so that it can be launched as soon as this one is sampled.
            self._next_step = self._next_step or self._schedule()
        for (_, seq, generation), error in await filling.wait():
            self._engine.fail_row(seq, generation, error)
        launched.result = launched.pending.sample(filling.masked_rows)
        if not is_delivered:
            if self._refusal is None:
                self._launch(is_delivery_due=True)
            await self._deliver()

    async def _deliver(self) -> None:
        """Yield to the event loop once, so that the readers of streams can send their tokens."""
        if self._trace is None:
            await asyncio.sleep(0)
            return
        began_s = time.perf_counter()
        await asyncio.sleep(0)
        self._trace.span("deliver", began_s, time.perf_counter())

    async def _finish_step(self) -> None:
        """Await the oldest step in flight and deliver what it has sampled."""
        step, result = self._in_flight[0].step, self._in_flight[0].result
        assert result is not None
        try:
            output = await result
        except Exception as error:
            self._on_failed_step(step, error)
        else:
            self._num_failed_steps = 0
            duration_s = time.monotonic() - self._step_start_s
            self._engine.note_duration(step, duration_s)
            if self._trace is not None:
                self._trace.step(step, duration_s)
            if self._refusal is None:
                self._engine.update(step, output)
        self._in_flight.popleft()
        self._step_start_s = time.monotonic()
        self._queue.note(self._step_start_s, self._engine.num_finished)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fail the running step if it has exceeded its deadline, and schedule the next check.

        Time in which this process was stopped (SIGSTOP, a paused container, a suspended machine)
        does not count: the step may have ended in it without anybody being able to notice.
        """
        deadline_s = self._engine.runner.step_deadline_s
        if deadline_s is None or (self._task is not None and self._task.done()):
            return
        now_s = time.monotonic()
        if now_s - self._looked_s > 2 * LOOK_S:
            self._step_start_s = min(self._step_start_s + now_s - self._looked_s, now_s)
        self._looked_s = now_s
        if self._in_flight and now_s - self._step_start_s > deadline_s:
            self._end_step(f"the GPU hangs: a step has not ended after {deadline_s:.0f} s")
        loop.call_later(min(LOOK_S, deadline_s), self._look, loop)

    def _end_step(self, reason: str) -> None:
        """Fail the oldest step in flight, which will never end because the device is lost."""
        result = self._in_flight[0].result
        if result is not None and not result.done():
            result.set_exception(DeviceError(reason))

    def _on_lost(self, reason: str) -> None:
        """Give up because another rank has ended or hangs: no step can end without it."""
        if self._task is None or self._task.done() or self._refusal is not None:
            return
        log.get_logger().error("%s", reason)
        self._is_device_lost = True
        self._give_up(reason)
        if self._in_flight:
            self._end_step(reason)

    def _on_failed_step(self, step: Step, error: Exception) -> None:
        shape = f"a step of {counted(step.num_tokens, 'token')} in {counted(len(step.seqs), 'row')}"
        if isinstance(error, DeviceError):
            self._on_lost_device(f"{shape} failed: {error}", str(error))
            return
        log.get_logger().error("%s failed", shape, exc_info=error)
        self._num_failed_steps += 1
        if self._refusal is not None:
            return
        self._engine.fail_step(step)
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            self._give_up(f"the engine has stopped: {MAX_FAILED_STEPS} steps in a row failed")

    def _on_lost_device(self, what: str, reason: str) -> None:
        log.get_logger().error("%s", what)
        self._is_device_lost = True
        if self._refusal is None:
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self._error = reason
        self._has_given_up.set()
        self._shut(reason, EngineError)

    def _shut(self, reason: str, error: type[RequestError]) -> None:
        """Refuse all new requests from now on and fail all sequences. Only a first call matters."""
        if self._refusal is None:
            self._refusal = reason
            self._engine.fail_all(error(reason))
            self._wakeup.set()
            self._sleep.tell()


def _still_asleep(failure: str | None) -> UnavailableError:
    return UnavailableError(f"the server sleeps and cannot wake up: {failure}", WAKE_AGAIN_S)
