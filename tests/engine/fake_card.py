"""A CPU that stands in for a card and its driver, under the real CudaRunner."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyserve.engine import cuda_runner
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from tests.engine.tiny import CONFIG, VOCAB_SIZE

NUM_BLOCKS, BLOCK_SIZE, NUM_SLOTS, MAX_MODEL_LEN = 32, 16, 4, 256


class FakeEvent:
    """What has been enqueued on a CPU has ended."""

    def __init__(self, blocking: bool = False) -> None:
        self._is_blocking = blocking
        self.is_recorded = False

    @property
    def cuda_event(self) -> int:
        assert self._is_blocking, "a thread would spin on it"
        return 0

    def record(self, stream: object) -> None:
        self.is_recorded = True

    def synchronize(self) -> None:
        pass


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: FakeEvent) -> None:
        assert event.is_recorded, "waits for nothing"


class FakeCuda:
    Event, Stream = FakeEvent, FakeStream

    @staticmethod
    def synchronize(device: torch.device) -> None:
        pass

    @staticmethod
    def memory_stats(device: torch.device) -> dict[str, int]:
        return {"num_device_alloc": 5}

    @staticmethod
    @contextmanager
    def stream(stream: FakeStream) -> Iterator[None]:
        yield


class FakeTorch:
    """torch, but for its part that needs a card."""

    cuda = FakeCuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)


class FakeCompletionThread:
    """As _host's; every event has ended when it is to be watched."""

    def __init__(self, driver_library: str, device_ordinal: int) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._completed: list[tuple[int, str]] = []

    def fileno(self) -> int:
        return self._fd

    def watch(self, step_id: int, event: int) -> None:
        self._completed.append((step_id, ""))
        os.eventfd_write(self._fd, 1)

    def drain(self) -> list[tuple[int, str]]:
        if self._completed:
            os.eventfd_read(self._fd)
        completed, self._completed = self._completed, []
        return completed

    def close(self) -> None:
        assert self._fd >= 0, "closed twice"
        os.close(self._fd)
        self._fd = -1


class FakeHost:
    CompletionThread = FakeCompletionThread


def load(folder: Path) -> Decoder:
    """The tiny model, the same each time."""
    return load_model(
        folder, ModelConfig.from_hf(CONFIG), Placement(torch.float32, torch.device("cpu")),
        load_format="dummy", seed=0, progress=lambda done, total: None,
    )  # fmt: skip


def take_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have CudaRunner use the one of this module."""
    monkeypatch.setattr(cuda_runner, "torch", FakeTorch())
    monkeypatch.setattr(cuda_runner, "build", SimpleNamespace(host=lambda: FakeHost))


def make_engine(monkeypatch: pytest.MonkeyPatch, folder: Path, *, is_eager: bool = False) -> Engine:
    """One on the CudaRunner, with NUM_BLOCKS allocated and nothing warm."""
    take_card(monkeypatch)
    executor = StepExecutor(
        load(folder),
        StepLimits(
            block_size=BLOCK_SIZE,
            num_slots=NUM_SLOTS,
            max_num_batched_tokens=32,
            max_model_len=MAX_MODEL_LEN,
            logits_tile_rows=NUM_SLOTS,
        ),
    )
    executor.allocate_kv(NUM_BLOCKS)
    return new_engine(CudaRunner(executor, is_eager=is_eager))


def new_engine(runner: CudaRunner) -> Engine:
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=False),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=32,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
    )
    return Engine(
        scheduler, runner, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE,
        policy="fcfs",
    )  # fmt: skip
