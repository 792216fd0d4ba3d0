"""Runs an engine by single operations and reads its streams, as AsyncEngine and the API do."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyserve.client import SequenceRequest, SequenceStream, TokenLogprobs
from pyserve.engine.batch import Step, StepOutput
from pyserve.engine.engine import Engine, Pending
from pyserve.engine.masks import Failure, MaskWorkers
from pyserve.errors import RequestError
from pyserve.params import SamplingParams
from tests.engine.constraints import Scripted


async def fill(
    workers: MaskWorkers, step: Step, bitmask: NDArray[np.int32]
) -> tuple[list[int], list[Failure]]:
    """The rows of `step` that are masked, and the sequences that cannot go on."""
    filling = workers.fill(step, bitmask)
    return filling.masked_rows, await filling.wait()


@dataclass
class Reader:
    """One submitted sequence and what has come out of it; `constraint` is one of ours or None."""

    prompt: list[int]
    params: SamplingParams
    stream: SequenceStream
    constraint: Scripted | None = None
    output: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def take(self) -> None:
        if self.is_finished:
            return
        try:
            while (delta := self.stream.take()) is not None:
                self.output += delta.token_ids
                self.logprobs += delta.logprobs or []
                self.finish_reason = delta.finish_reason
                if delta.finish_reason is not None:
                    if delta.stop_token_id is not None:
                        assert delta.finish_reason == "stop"
                        assert delta.stop_token_id == self.output[-1]
                    return
        except RequestError as error:
            self.error = error

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Driver:
    """Runs an engine by single operations, with up to `depth` steps launched ahead.

    A step in flight that waits for its masks is the last, and has its Pending in a result's place.
    """

    def __init__(self, engine: Engine, depth: int) -> None:
        self.engine = engine
        self.depth = depth
        self.readers: list[Reader] = []
        self.in_flight: deque[tuple[Step, asyncio.Future[StepOutput] | Pending]] = deque()
        self._masks = MaskWorkers(2, engine._vocab_size)
        self._loop = asyncio.new_event_loop()
        weakref.finalize(self, self._masks.close)
        weakref.finalize(self, self._loop.close)
        engine.runner.attach(self._loop)

    def submit(
        self, prompt: list[int], params: SamplingParams, constraint: Scripted | None = None,
        **kwargs: Any,
    ) -> Reader:  # fmt: skip
        request = SequenceRequest(prompt, params, constraint=constraint, **kwargs)
        reader = Reader(prompt, params, self.engine.add(request), constraint)
        self.readers.append(reader)
        return reader

    def launch(self) -> bool:
        if len(self.in_flight) > self.depth:
            return False
        if self.in_flight and isinstance(self.in_flight[-1][1], Pending):
            return False
        step = self.engine.schedule()
        if step is None:
            return False
        pending = self.engine.runner.launch(step)
        waits = self.engine.is_host_dependent(step)
        self.in_flight.append((step, pending if waits else pending.sample()))
        return True

    def sample(self) -> bool:
        """Fill the masks of the oldest step, if it waits for them, and queue the rest of it."""
        if not self.in_flight:
            return False
        step, pending = self.in_flight[0]
        if not isinstance(pending, Pending):
            return False
        masked_rows, failures = self._loop.run_until_complete(
            fill(self._masks, step, pending.bitmask)
        )
        for row, error in failures:
            self.engine.fail_row(row.seq, row.generation, error)
        self.in_flight[0] = step, pending.sample(masked_rows)
        return True

    def update(self) -> bool:
        if not self.in_flight or isinstance(self.in_flight[0][1], Pending):
            return False
        step, result = self.in_flight.popleft()
        assert isinstance(result, asyncio.Future)
        try:
            output = self._loop.run_until_complete(result)
        except Exception:
            self.engine.fail_step(step)
        else:
            self.engine.update(step, output)
        for reader in self.readers:
            reader.take()
        return True

    def drain(self) -> None:
        while self.launch() or self.sample() or self.update():
            pass
        assert all(reader.is_finished for reader in self.readers)
