"""Group: what the ranks of a model tell each other in a step.

Every rank makes the same calls in the same order, with tensors of the same shapes, but for `send`
and `receive`, which are between two. ProcessGroup is the plain way, through torch.distributed: gloo
between processes on a CPU, NCCL between cards.
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

JOIN_S = 30.0  # for all ranks to come together
# A rank that is gone closes its connections, which is seen at once; this is for one that hangs.
STEP_S = 600.0
LEADER = 0  # the rank that samples


class Group(Protocol):
    """tp_rank, tp_size   this rank of how many."""

    tp_rank: int
    tp_size: int

    def all_reduce(self, x: torch.Tensor) -> None:
        """x := the sum of all ranks' x, in place; every rank gets the same bits."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
        out: torch.Tensor, offset: float,
    ) -> None:  # fmt: skip
        """ops.add_rms_norm of the sum of all ranks' x, which may be overwritten."""

    def gather(self, parts: torch.Tensor) -> None:
        """parts [tp_size, ...] of the leader := part r of each rank r.

        Another rank gives [1, ...], its own; the leader's own part is in its place already.
        """

    def broadcast(self, x: torch.Tensor) -> None:
        """x := the leader's x, in place."""

    def send(self, x: torch.Tensor, taker: int) -> None:
        """Let the rank `taker`, which receives, have x."""

    def receive(self, x: torch.Tensor, giver: int) -> None:
        """x := what the rank `giver` sends, in place."""

    def close(self) -> None:
        """Leave; no call follows."""


class ProcessGroup:
    """Implements Group; one a process, as torch.distributed keeps it.

    store  of words that the ranks have in common.
    """

    _is_launched = False

    def __init__(
        self, meeting: Path | str, tp_rank: int, tp_size: int, device: torch.device
    ) -> None:
        """Waits for the other ranks, who name the same file, in a folder that only they can write.

        Raises DeviceError where they do not come in JOIN_S.
        """
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.store = store = dist.FileStore(str(meeting), tp_size)  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=JOIN_S))
        _meet(device, store=store, rank=tp_rank, world_size=tp_size)

    @classmethod
    def launched(cls, device: torch.device) -> ProcessGroup:
        """Of the ranks that torchrun has started, on whichever machines: the same again when called
        again. Raises DeviceError."""
        group = cls.__new__(cls)
        if not dist.is_initialized():
            _meet(device)
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
        if not self._is_launched:  # there its end would be that of all groups, one for words among
            dist.destroy_process_group()


def _meet(device: torch.device, **where: Any) -> None:
    """Make torch's process group, `where` it is told. Raises DeviceError."""
    # Sums in the switch need multicast memory, which can take the cards of a shared host out of
    # service where a process that has it dies.
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
