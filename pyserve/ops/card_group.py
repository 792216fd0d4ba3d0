"""CardGroup: a Group of cards of one machine that uses our own kernels if they are faster."""

from __future__ import annotations

from pathlib import Path

import torch

from pyserve import log
from pyserve.ops.group import LEADER, Group, ProcessGroup
from pyserve.ops.peers import PeerGroup, exchange_over


class CardGroup:
    """Implements Group. Small and medium messages go directly through the cards' memory, by
    PeerGroup. Larger ones go through NCCL, and so do all if the cards cannot reach each other.

    reason   why they cannot, for the log; None if they can.
    """

    def __init__(
        self, meeting: Path | str, tp_rank: int, tp_size: int, device: torch.device
    ) -> None:
        """As ProcessGroup."""
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self._process = ProcessGroup(meeting, tp_rank, tp_size, device)
        exchange = exchange_over(self._process.store, tp_rank, tp_size)
        self._peers = PeerGroup(tp_rank, tp_size, device, exchange)
        self.reason = self._peers.reason
        if self.reason is not None and tp_rank == LEADER:
            log.get_logger().warning("the cards cannot use each other's memory: %s", self.reason)

    def all_reduce(self, x: torch.Tensor) -> None:
        if self.reason is None and self._peers.takes(x):
            self._peers.all_reduce_(x)
        else:
            self._process.all_reduce(x)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
        out: torch.Tensor, offset: float,
    ) -> None:  # fmt: skip
        if self.reason is None and self._peers.takes(x):
            self._peers.all_reduce_add_norm(x, residual, weight, eps, out, offset)
        else:
            self._process.add_rms_norm(x, residual, weight, eps, out, offset)

    def gather(self, parts: torch.Tensor) -> None:
        if self.reason is None:
            self._peers.gather_parts(parts[0], parts if self.tp_rank == LEADER else None)
        else:
            self._process.gather(parts)

    def broadcast(self, x: torch.Tensor) -> None:
        if self.reason is None and x.dtype == torch.int32:
            self._peers.broadcast_tokens(x)
        else:
            self._process.broadcast(x)

    def send(self, x: torch.Tensor, taker: int) -> None:
        self._process.send(x, taker)

    def receive(self, x: torch.Tensor, giver: int) -> None:
        self._process.receive(x, giver)

    def close(self) -> None:
        self._peers.close()
        self._process.close()


def join_group(meeting: Path | str, tp_rank: int, tp_size: int, device: torch.device) -> Group:
    """Make the Group for this rank's kind of device; arguments and errors as of ProcessGroup."""
    if device.type == "cuda":
        return CardGroup(meeting, tp_rank, tp_size, device)
    return ProcessGroup(meeting, tp_rank, tp_size, device)
