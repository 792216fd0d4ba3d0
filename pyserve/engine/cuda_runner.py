"""CudaRunner: launches steps on a CUDA stream from the event loop, without waiting for them.

A step is one copy to the device, the kernels of the forward pass, those of sampling, one copy back,
and one CUDA event. A thread of the native module `_host` waits for the event and wakes the loop
through an eventfd; the loop then reads the sampled tokens from pinned memory. Host buffers form a
ring: an entry is reused only after the step that used it has ended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from pyserve import collector
from pyserve.engine.batch import Asked, Step, StepOutput, StepShape, pack
from pyserve.engine.engine import Pending
from pyserve.engine.executor import StepExecutor, refuse_when_closed
from pyserve.engine.preload import DRIVER_LIBRARY
from pyserve.engine.warmup import graph_steps, largest_step, warmup_steps
from pyserve.errors import DeviceError
from pyserve.ops import build
from pyserve.ops.build import Report, report_nothing

RING_SIZE = 4  # host buffers, and so the maximum number of steps in flight
STEP_DEADLINE_S = 60.0  # many times the duration of the largest step on the slowest card


@dataclass(slots=True, eq=False)
class _RingEntry:
    """Pinned host memory of one step in flight.

    results, asked and told have the shapes and dtypes of the executor's tensors of these names.
    """

    step_input: torch.Tensor  # int32 [max_step_words]
    words: NDArray[np.int32]  # the memory of step_input as a NumPy array
    results: torch.Tensor
    asked: torch.Tensor
    told: torch.Tensor
    event: torch.cuda.Event  # recorded behind the step's last copy


@dataclass(slots=True, eq=False)
class _InFlight:
    step_id: int
    shape: StepShape
    asked: Asked
    entry: _RingEntry
    result: asyncio.Future[StepOutput]


class CudaRunner:
    """Implements engine.Runner on the executor's CUDA device.

    One step runs while the next is being launched, so the card does not wait for the host.

    is_eager  record no CUDA graphs: every step is launched op by op, at a higher cost on the host.
    """

    pack = staticmethod(pack)  # an attribute, so that Trace.watch can wrap it
    run_ahead_depth = 1
    step_deadline_s: float | None = STEP_DEADLINE_S

    def __init__(self, executor: StepExecutor, *, is_eager: bool = False) -> None:
        self._executor = executor
        self._is_eager = is_eager
        self._is_closed = False
        device = executor.device
        torch.cuda.synchronize(device)  # weights and buffers were written on other streams
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # On a stream of their own, masks are copied while the step's forward pass still runs.
        self._mask_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._masks_event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ring = deque(
            _RingEntry(
                step_input=step_input,
                words=step_input.numpy(),
                results=_pinned(*executor.results.shape, dtype=executor.results.dtype),
                asked=_pinned(*executor.asked.shape),
                told=_pinned(*executor.told.shape),
                event=torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
            )
            for step_input in [_pinned(len(executor.step_input)) for _ in range(RING_SIZE)]
        )
        # One buffer of each is enough: a step's masks are written after all earlier steps ended.
        self._bitmask = _pinned(*executor.bitmask.shape)
        self._masked_rows = _pinned(len(executor.masked_rows))
        self._in_flight: deque[_InFlight] = deque()
        self._next_step_id = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._completions = build.host().CompletionThread(DRIVER_LIBRARY, device.index or 0)

    @property
    def num_device_allocations(self) -> int:
        return int(torch.cuda.memory_stats(self._executor.device).get("num_device_alloc", 0))

    def warm_up_largest(self) -> None:
        """Run the step that needs the most memory, with a KV cache of only one block."""
        self._allocate_kv(1)
        self._run_and_wait(largest_step(self._executor.limits))

    def allocate_kv(self, num_blocks: int, *, report: Report = report_nothing) -> None:
        """Allocate the KV cache, then run the shapes of `warmup_steps` and record the small ones as
        CUDA graphs, so that kernels are loaded and memory is allocated before serving.

        Shapes without a graph are run through only one layer of each kind: further layers would
        call the same kernels again, which takes more than a second on a large model.
        report(done, total) counts the shapes.
        """
        self._allocate_kv(num_blocks)
        recorded: list[Step] = []
        limits, num_adapter_slots = self._executor.limits, self._executor.num_adapter_slots
        if not self._is_eager:
            recorded += graph_steps(
                limits, num_blocks=num_blocks, vocab_size=self._executor.vocab_size,
                num_adapter_slots=num_adapter_slots,
            )  # fmt: skip
        are_run = {step.num_tokens for step in recorded}  # recording a step runs it as well
        steps = [
            step
            for step in warmup_steps(limits, num_adapter_slots=num_adapter_slots)
            if step.num_tokens not in are_run
        ]
        total = len(steps) + len(recorded)
        for done, step in enumerate(steps):
            report(done, total)
            self._run_and_wait(step, is_warmup=True)
        for done, step in enumerate(recorded, len(steps)):
            report(done, total)
            self._record(step)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver the results of later launches on `loop`."""
        if self._is_closed:
            refuse_when_closed()
        self._loop = loop
        loop.add_reader(self._completions.fileno(), self._on_completions)

    def launch(self, step: Step) -> Pending:
        if self._is_closed:
            refuse_when_closed()
        assert self._loop is not None, "steps are launched on a loop"
        entry, result = self._ring.popleft(), self._loop.create_future()
        try:
            shape = self._forward(step, entry)
        except Exception as error:
            self._fail(entry, result, error)
            return Pending(lambda masked_rows: result, self._bitmask.numpy())
        sample = partial(self._launch_sampling, shape, step.asked, entry, result)
        return Pending(sample, self._bitmask.numpy())

    def is_replayed(self, step: Step) -> bool:
        return self._executor.has_graph(step.shape)

    def run(self, step: Step) -> StepOutput:
        return self._run(step)

    def close(self) -> None:
        """Free the memory; no step may be in flight. Harmless when called again."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._completions.fileno())
        self._completions.close()
        self._executor.close()
        self._ring.clear()

    def _run(self, step: Step, *, is_warmup: bool = False) -> StepOutput:
        if self._is_closed:
            refuse_when_closed()
        entry = self._ring[0]
        try:
            shape = self._forward(step, entry, is_warmup=is_warmup)
            self._sample(shape, step.asked, entry)
            entry.event.synchronize()
        except Exception as error:
            raise self._explained(error) from None
        return self._output(shape, step.asked, entry)

    def _forward(self, step: Step, entry: _RingEntry, *, is_warmup: bool = False) -> StepShape:
        with torch.cuda.stream(self._stream):
            for load in step.adapter_loads:  # queued behind all steps that use the old adapter
                self._executor.put_adapter(load)
            shape = self._bring(step, entry)
            self._executor.forward(shape, is_warmup=is_warmup)
        return shape

    def _bring(self, step: Step, entry: _RingEntry) -> StepShape:
        """Pack the step into `entry` and queue its copy to the executor's step_input."""
        num_words = self.pack(step, entry.words)
        self._executor.bring(entry.step_input[:num_words])
        return step.shape

    def _sample(
        self, shape: StepShape, asked: Asked, entry: _RingEntry, masked_rows: Sequence[int] = ()
    ) -> None:
        executor = self._executor
        with torch.cuda.stream(self._stream):
            if masked_rows:
                self._bring_masks(masked_rows)
            if any(asked):
                executor.pack_asked(asked, entry.asked.numpy())
                executor.asked.copy_(entry.asked, non_blocking=True)
            results = executor.sample(shape, masked_rows, asked)
            # Of token ids (1-D) all are copied, as they are few and copies of one size cost the
            # host least; of pooled vectors (2-D) only the rows that this step has computed.
            count = len(results) if results.dim() == 1 else shape.num_samples
            entry.results[:count].copy_(results[:count], non_blocking=True)
            num_slots = executor.limits.num_slots
            for first, count in (
                (0, len(asked.sampled_rows)), (num_slots, len(asked.prompt_rows))
            ):  # fmt: skip
                if count:
                    rows = slice(first, first + count)
                    entry.told[rows].copy_(executor.told[rows], non_blocking=True)
            entry.event.record(self._stream)

    def _output(self, shape: StepShape, asked: Asked, entry: _RingEntry) -> StepOutput:
        results = entry.results.numpy()[: shape.num_samples]
        return self._executor.output(results, asked, entry.told.numpy())

    def _bring_masks(self, masked_rows: Sequence[int]) -> None:
        """Queue the copies of the masks and of the rows that they belong to.

        The copies need not wait for `_stream`: all steps that read the old masks have ended.
        """
        executor, num_rows = self._executor, len(masked_rows)
        self._masked_rows.numpy()[:num_rows] = executor.tile_rows(masked_rows)
        with torch.cuda.stream(self._mask_stream):
            executor.masked_rows[:num_rows].copy_(self._masked_rows[:num_rows], non_blocking=True)
            executor.bitmask[:num_rows].copy_(self._bitmask[:num_rows], non_blocking=True)
            self._masks_event.record(self._mask_stream)
        self._stream.wait_event(self._masks_event)

    def _launch_sampling(
        self, shape: StepShape, asked: Asked, entry: _RingEntry,
        result: asyncio.Future[StepOutput], masked_rows: Sequence[int],
    ) -> asyncio.Future[StepOutput]:  # fmt: skip
        try:
            self._sample(shape, asked, entry, masked_rows)
        except Exception as error:
            self._fail(entry, result, error)
            return result
        step_id = self._next_step_id
        self._next_step_id += 1
        self._in_flight.append(_InFlight(step_id, shape, asked, entry, result))
        self._completions.watch(step_id, entry.event.cuda_event)
        return result

    def _fail(
        self, entry: _RingEntry, result: asyncio.Future[StepOutput], error: Exception
    ) -> None:
        """Fail a step that could not be launched completely, and return its ring entry."""
        result.set_exception(self._explained(error))
        self._ring.append(entry)

    def _on_completions(self) -> None:
        for step_id, error in self._completions.drain():
            assert step_id == self._in_flight[0].step_id, "steps end in order"
            self._complete(error)

    def _complete(self, error: str) -> None:
        """Deliver the result of the oldest step in flight, which has ended.

        error  the name of the CUDA error that it ended with; "" where it succeeded.
        """
        step = self._in_flight.popleft()
        if step.result.done():
            pass  # it was given up as hanging (AsyncEngine._look), so nobody waits for it
        elif error:
            step.result.set_exception(DeviceError(f"the GPU failed: {error}"))
        else:
            step.result.set_result(self._output(step.shape, step.asked, step.entry))
        self._ring.append(step.entry)

    def _explained(self, error: Exception) -> Exception:
        """Return `error`, or a DeviceError if the device has failed and takes no more work."""
        try:
            # This also waits for launched work that still reads the ring entry.
            self._stream.synchronize()
        except RuntimeError as device_error:
            first_line, _, _ = str(device_error).partition("\n")
            return DeviceError(f"the GPU failed: {first_line}")
        return error

    def _allocate_kv(self, num_blocks: int) -> None:
        # On the steps' stream, torch's allocator would give the KV cache memory that it has cached
        # for the temporaries of steps, and the next step would have to allocate them again.
        self._executor.allocate_kv(num_blocks)
        torch.cuda.synchronize(self._executor.device)

    def _record(self, step: Step) -> None:
        try:
            # If the garbage collector freed a CUDA tensor during capture, the graph would be void.
            with torch.cuda.stream(self._stream), collector.paused():
                self._executor.record(self._bring(step, self._ring[0]))
        except Exception as error:
            raise self._explained(error) from None

    def _run_and_wait(self, step: Step, *, is_warmup: bool = False) -> None:
        with torch.cuda.stream(self._stream):
            self._executor.reset()
            self._run(step, is_warmup=is_warmup)
            self._executor.reset()


def _pinned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=True)
