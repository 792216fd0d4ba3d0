"""Group: the communication between the ranks of a model within a step.

All ranks make the same calls in the same order, with tensors of the same shapes, except for `send`
and `receive`, which are between two ranks. ProcessGroup uses torch.distributed: gloo between
processes on a CPU, NCCL between cards.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pyserve import ops
from pyserve.errors import DeviceError
from pyserve.ops.meeting import meeting

JOIN_S = 30.0  # time limit for all ranks to join
# Time limit of a call, for a rank that hangs. A rank that has ended is noticed at once, because its
# connections close.
STEP_S = 600.0
LEADER = 0  # the rank that samples


def is_by_others(error: BaseException) -> bool:
    """Whether a call of torch.distributed failed, which is most likely because another rank has
    ended: gloo raises a RuntimeError that only its text tells apart."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


class Group(Protocol):
    """The ranks of a model. tp_rank is this rank's number, tp_size how many there are; in a
    pipeline they count its ranks."""

    tp_rank: int
    tp_size: int

    def all_reduce(self, x: torch.Tensor) -> None:
        """x := the sum of all ranks' x, in place; bit-equal on all ranks."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
        out: torch.Tensor, offset: float,
    ) -> None:  # fmt: skip
        """ops.add_rms_norm of the sum of all ranks' x; x may be overwritten."""

    def gather(self, parts: torch.Tensor) -> None:
        """On the leader: parts [tp_size, ...], where parts[r] := the part of rank r.

        The leader's own part must already be in parts[0]. Another rank passes its part as
        [1, ...].
        """

    def broadcast(self, x: torch.Tensor) -> None:
        """x := the leader's x, in place, on all ranks."""

    def send(self, x: torch.Tensor, taker: int) -> None:
        """Send x to the rank `taker`, which calls `receive`."""

    def receive(self, x: torch.Tensor, giver: int) -> None:
        """x := the tensor that the rank `giver` sends, in place."""

    def close(self) -> None:
        """Leave the group; no call may follow."""


class ProcessGroup:
    """Implements Group by torch.distributed's default group, so there is only one per process.

    store  torch's key-value store that all ranks share; not set by `launched`.
    """

    _is_launched = False

    def __init__(
        self, meeting: Path | str, tp_rank: int, tp_size: int, device: torch.device
    ) -> None:
        """Join the other ranks; waits for them.

        meeting  path of a file through which the ranks meet; only they may be able to write to it.

        Raises DeviceError if not all ranks join within JOIN_S.
        """
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.store = store = dist.FileStore(str(meeting), tp_size)  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=JOIN_S))
        _meet(device, store=store, rank=tp_rank, world_size=tp_size)

    @classmethod
    def launched(cls, device: torch.device) -> ProcessGroup:
        """The group of all ranks that torchrun has started, on one or several machines. May be
        called again. They watch each other in the meeting until its `end`. Raises DeviceError."""
        group = cls.__new__(cls)
        if not dist.is_initialized():
            here = meeting()
            here.wait_all("groups")
            here.watch()
            # A clone: torch would keep the watch from the store while it waits there for others.
            store = here.store.clone()
            _meet(device, store=store, rank=here.tp_rank, world_size=here.tp_size)
        group.tp_rank, group.tp_size = dist.get_rank(), dist.get_world_size()
        group._is_launched = True
        return group

    def all_reduce(self, x: torch.Tensor) -> None:
        dist.all_reduce(x)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
        out: torch.Tensor, offset: float,
    ) -> None:  # fmt: skip
        dist.all_reduce(x)
        ops.add_rms_norm(x, residual, weight, eps, out, offset)

    def gather(self, parts: torch.Tensor) -> None:
        is_leader = self.tp_rank == LEADER
        dist.gather(parts[0], list(parts.unbind()) if is_leader else None, dst=LEADER)

    def broadcast(self, x: torch.Tensor) -> None:
        dist.broadcast(x, LEADER)

    def send(self, x: torch.Tensor, taker: int) -> None:
        dist.send(x, taker)

    def receive(self, x: torch.Tensor, giver: int) -> None:
        dist.recv(x, giver)

    def close(self) -> None:
        if not self._is_launched:  # under torchrun this would destroy the groups for messages too
            dist.destroy_process_group()


def _meet(device: torch.device, **where: Any) -> None:
    """Initialise torch's default process group with the arguments `where`. Raises DeviceError."""
    # NVLS (sums in the NVLink switch) needs multicast memory. If a process that has some dies, it
    # can take the cards of a shared host out of service.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    is_cpu = device.type == "cpu"
    try:
        dist.init_process_group(
            "gloo" if is_cpu else "nccl",
            timeout=timedelta(seconds=STEP_S),
            device_id=None if is_cpu else device,
            **where,
        )
    except (RuntimeError, ValueError) as error:
        first_line, _, _ = str(error).partition("\n")
        raise DeviceError(f"the ranks did not come together: {first_line}") from error
