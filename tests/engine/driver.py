"""Runs an engine by single operations and reads its streams, as AsyncEngine and the API do."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from dataclasses import dataclass, field

from pyserve.client import SequenceRequest, SequenceStream
from pyserve.engine.batch import Step, StepOutput
from pyserve.engine.engine import Engine
from pyserve.errors import EngineError
from pyserve.params import SamplingParams


@dataclass
class Reader:
    """One submitted sequence and what has come out of it."""

    prompt: list[int]
    params: SamplingParams
    stream: SequenceStream
    output: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None

    def take(self) -> None:
        if self.is_finished:
            return
        try:
            while (delta := self.stream.take()) is not None:
                self.output += delta.token_ids
                self.finish_reason = delta.finish_reason
                if delta.finish_reason is not None:
                    if delta.finish_reason == "stop":
                        assert delta.stop_token_id == self.output[-1]
                    return
        except EngineError as error:
            self.error = error

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Driver:
    """Runs an engine by single operations, with up to `depth` steps launched ahead."""

    def __init__(self, engine: Engine, depth: int) -> None:
        self.engine = engine
        self.depth = depth
        self.readers: list[Reader] = []
        self.in_flight: deque[tuple[Step, asyncio.Future[StepOutput]]] = deque()
        self._loop = asyncio.new_event_loop()
        weakref.finalize(self, self._loop.close)
        engine.runner.attach(self._loop)

    def submit(self, prompt: list[int], params: SamplingParams, **kwargs: int | str) -> Reader:
        stream = self.engine.add(SequenceRequest(prompt, params, **kwargs))  # type: ignore[arg-type]
        reader = Reader(prompt, params, stream)
        self.readers.append(reader)
        return reader

    def launch(self) -> bool:
        if len(self.in_flight) > self.depth:
            return False
        step = self.engine.schedule()
        if step is None:
            return False
        self.in_flight.append((step, self.engine.runner.launch(step).sample()))
        return True

    def update(self) -> bool:
        if not self.in_flight:
            return False
        step, result = self.in_flight.popleft()
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
        while self.launch() or self.update():
            pass
        assert all(reader.is_finished for reader in self.readers)
