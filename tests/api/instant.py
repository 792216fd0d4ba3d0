"""The real engine, but for the model: every token is there at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from pyserve.client import EngineInfo, PoolingInfo
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import Step, StepOutput, max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.engine import Engine, Pending
from pyserve.engine.masks import bitmask_words
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.sleep import Sleep
from pyserve.engine.slots import SlotAllocator

NUM_BLOCKS, BLOCK_SIZE = 40_000, 16

E = TypeVar("E", bound=AsyncEngine)


class InstantRunner:
    """Every token is an "h", at once, or the first that a mask allows.

    width  of the vector that each prompt becomes, where it pools; 0: it samples.
    """

    run_ahead_depth = 1
    step_deadline_s: float | None = None
    num_device_allocations = 0

    def __init__(self, vocab_size: int, num_slots: int, width: int = 0) -> None:
        self._vector = np.linspace(-1, 1, width, dtype=np.float32)
        self.bitmask = np.empty((num_slots, bitmask_words(vocab_size)), np.int32)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def is_replayed(self, step: Step) -> bool:
        return True

    def launch(self, step: Step) -> Pending:
        def sample(masked_rows: Sequence[int]) -> asyncio.Future[StepOutput]:
            result = self.loop.create_future()
            self.loop.call_soon(result.set_result, self.run(step, masked_rows))
            return result

        return Pending(sample, self.bitmask)

    def run(self, step: Step, masked_rows: Sequence[int] = ()) -> StepOutput:
        num_samples = sum(step.row_samples)
        if self._vector.size:
            return StepOutput.of_pooled(np.tile(self._vector, (num_samples, 1)))
        rows = [[75] for _ in range(num_samples)]
        for row, words in zip(masked_rows, self.bitmask, strict=False):
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
            rows[row] = [int(np.argmax(allowed))]
        return StepOutput(rows)

    def close(self) -> None:
        pass


class InstantSleeper:
    """Has nothing to give back."""

    def sleep(self, level: int) -> None:
        pass

    def wake_up(self) -> None:
        pass


def make_engine(
    vocab_size: int, *, max_model_len: int, num_slots: int, kind: type[E],
    pooling: PoolingInfo | None = None, max_queue: int = 1024,
) -> E:  # fmt: skip
    """An engine of this `kind`; its tokens are those of a vocabulary in which 75 is an "h"."""
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=True),
        SlotAllocator(num_slots),
        max_num_batched_tokens=8192,
        max_update_words=max_update_words(max_model_len, BLOCK_SIZE),
    )
    engine = Engine(
        scheduler,
        InstantRunner(vocab_size, num_slots, pooling.width if pooling else 0),
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        policy="fcfs",
        is_pooling=pooling is not None,
    )
    info = EngineInfo(
        max_model_len=max_model_len, vocab_size=vocab_size, max_num_seqs=num_slots,
        block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32", device="cpu",
        pooling=pooling, max_queue=max_queue,
    )  # fmt: skip
    return kind(engine, info, sleep=Sleep(InstantSleeper()))
