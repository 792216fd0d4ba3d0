"""Ranks as threads of the test's process: a Group over memory that all of them see."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import TypeVar

import torch

from pyserve import ops
from pyserve.ops.group import LEADER

T = TypeVar("T")
MEET_S = 60.0


class Meeting:
    """Where the ranks lay down what they have."""

    def __init__(self, tp_size: int) -> None:
        self.barrier = threading.Barrier(tp_size, timeout=MEET_S)
        self.laid: list[torch.Tensor] = [torch.empty(0)] * tp_size
        ranks = range(tp_size)
        self.sent = {(giver, taker): Queue[torch.Tensor]() for giver in ranks for taker in ranks}


class ThreadGroup:
    """Implements Group."""

    def __init__(self, meeting: Meeting, tp_rank: int) -> None:
        self.tp_rank, self.tp_size = tp_rank, len(meeting.laid)
        self._meeting = meeting

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, in their order."""
        self._meeting.laid[self.tp_rank] = x.clone()
        self._meeting.barrier.wait()
        laid = list(self._meeting.laid)
        self._meeting.barrier.wait()
        return laid

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(torch.stack([it.float() for it in self._all(x)]).sum(0))

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
        out: torch.Tensor, offset: float,
    ) -> None:  # fmt: skip
        self.all_reduce(x)
        ops.add_rms_norm(x, residual, weight, eps, out, offset)

    def gather(self, parts: torch.Tensor) -> None:
        laid = self._all(parts[0])
        if self.tp_rank == LEADER:
            parts.copy_(torch.stack(laid))

    def broadcast(self, x: torch.Tensor) -> None:
        x.copy_(self._all(x)[LEADER])

    def send(self, x: torch.Tensor, taker: int) -> None:
        self._meeting.sent[self.tp_rank, taker].put(x.clone())

    def receive(self, x: torch.Tensor, giver: int) -> None:
        x.copy_(self._meeting.sent[giver, self.tp_rank].get(timeout=MEET_S))

    def close(self) -> None:
        """Nothing to leave."""


def on_all_ranks(tp_size: int, run: Callable[[ThreadGroup], T]) -> list[T]:
    """`run` on a thread a rank; what each returns."""
    meeting = Meeting(tp_size)

    def run_one(tp_rank: int) -> T:
        try:
            return run(ThreadGroup(meeting, tp_rank))
        except BaseException:
            meeting.barrier.abort()  # the others need not wait for it
            raise

    with ThreadPoolExecutor(tp_size) as pool:
        return list(pool.map(run_one, range(tp_size)))
