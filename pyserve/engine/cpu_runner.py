"""CpuRunner: runs steps on one thread, beside the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from pyserve.engine.batch import Asked, Step, StepOutput, StepShape, pack
from pyserve.engine.engine import Pending
from pyserve.engine.executor import StepExecutor, refuse_when_closed
from pyserve.ops.build import Report, report_nothing


class CpuRunner:
    """Implements engine.Runner on a CPU: steps run on one worker thread.

    The event loop only hands over a Step and gets a future: packing, forward and sampling happen on
    the worker, most of it outside the GIL.

    num_threads  how many threads one op may use.
    """

    pack = staticmethod(pack)  # an attribute, so that Trace.watch can wrap it
    run_ahead_depth = 0  # running ahead gains nothing: the next step needs the same cores
    step_deadline_s: float | None = None  # the prefill of a long prompt may take minutes

    def __init__(self, executor: StepExecutor, *, num_threads: int) -> None:
        self._executor = executor
        self._is_closed = False
        self._words = torch.zeros_like(executor.step_input)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = ThreadPoolExecutor(
            1, "step", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    @property
    def num_device_allocations(self) -> int:
        return 0

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._is_closed:
            refuse_when_closed()
        self._loop = loop

    def warm_up(
        self, steps: Sequence[Step], *, budget_s: float, report: Report = report_nothing
    ) -> None:
        """Run `steps` through one layer of each kind, until `budget_s` seconds are spent.

        Matrix libraries compile code for each shape when they first meet it, and keep it.
        report(done, total) counts the steps.
        """
        deadline_s = time.monotonic() + budget_s
        for done, step in enumerate(steps):
            report(done, len(steps))
            if time.monotonic() > deadline_s:
                break
            self._executor.reset()
            self._run(step, is_warmup=True)
        self._executor.reset()

    def is_replayed(self, step: Step) -> bool:
        return False

    def launch(self, step: Step) -> Pending:
        if self._is_closed:
            refuse_when_closed()
        assert self._loop is not None, "steps are launched on a loop"
        forward = self._thread.submit(self._forward, step)
        sample = partial(self._start_sampling, self._loop, forward, step.asked)
        return Pending(sample, self._executor.bitmask.numpy())

    def run(self, step: Step) -> StepOutput:
        return self._run(step)

    def close(self) -> None:
        """End the worker thread and drop the tensors; no step may be in flight."""
        self._is_closed = True
        self._thread.shutdown()
        self._executor.close()

    def _start_sampling(
        self, loop: asyncio.AbstractEventLoop, forward: Future[StepShape], asked: Asked,
        masked_rows: Sequence[int] = (),
    ) -> asyncio.Future[StepOutput]:  # fmt: skip
        """Sample on the worker. The result is a future of its own: unlike that of run_in_executor,
        it may be failed before the step ends, as where another rank is lost."""
        result: asyncio.Future[StepOutput] = loop.create_future()

        def pass_on() -> None:
            if result.done():
                return
            if (error := work.exception()) is not None:
                result.set_exception(error)
            else:
                result.set_result(work.result())

        def on_end(work: Future[StepOutput]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(pass_on)

        work = self._thread.submit(self._sample, forward, asked, masked_rows)
        work.add_done_callback(on_end)
        return result

    def _run(self, step: Step, *, is_warmup: bool = False) -> StepOutput:
        if self._is_closed:
            refuse_when_closed()
        forward = self._thread.submit(self._forward, step, is_warmup=is_warmup)
        return self._thread.submit(self._sample, forward, step.asked).result()

    def _forward(self, step: Step, *, is_warmup: bool = False) -> StepShape:
        for load in step.adapter_loads:
            self._executor.put_adapter(load)
        num_words = self.pack(step, self._words.numpy())
        self._executor.bring(self._words[:num_words])
        self._executor.forward(step.shape, is_warmup=is_warmup)
        return step.shape

    def _sample(
        self, forward: Future[StepShape], asked: Asked, masked_rows: Sequence[int] = ()
    ) -> StepOutput:
        """Sample the step of `forward`, which has ended: the one worker runs its calls in order."""
        shape = forward.result()
        if masked_rows:
            rows = self._executor.tile_rows(masked_rows)
            self._executor.masked_rows[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        if any(asked):
            self._executor.pack_asked(asked, self._executor.asked.numpy())
        results = self._executor.sample(shape, masked_rows, asked).numpy()[: shape.num_samples]
        return self._executor.output(results, asked, self._executor.told.numpy())
