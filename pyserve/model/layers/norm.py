"""RMSNorm (Zhang and Sennrich 2019), alone or fused with the residual add before it."""

from __future__ import annotations

import torch

from pyserve import ops
from pyserve.model.destination import Destination, Destinations
from pyserve.model.layer_config import NormConfig
from pyserve.model.placement import Placement


class RMSNorm:
    """x / rms(x) * (weight + offset) over the last dimension; accumulates in float32.

    The offset is added in float32 at each call: a stored 1 + w would be rounded once more.
    """

    __slots__ = ("weight", "eps", "offset", "_name", "_group")

    def __init__(self, name: str, size: int, config: NormConfig, placement: Placement) -> None:
        self._name = name
        self._group = placement.group
        self.eps = config.eps
        self.offset = config.offset
        self.weight = torch.empty(size, dtype=placement.dtype, device=placement.device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x [..., size] -> out, of the same shape; out may be x itself."""
        ops.rms_norm(x, self.weight, self.eps, out, self.offset)

    def read(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """The norm of residual -> out. Has the signature of `add`, but ignores x: it has been added
        to the residual already, or there is none (first layer)."""
        ops.rms_norm(residual, self.weight, self.eps, out, self.offset)

    def add(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """residual += x in place, then the norm of residual -> out. All [num_tokens, size]."""
        ops.add_rms_norm(x, residual, self.weight, self.eps, out, self.offset)

    def add_normed(
        self, inner: RMSNorm, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor
    ) -> None:
        """`add` of inner(x); `inner` has the same eps and offset as this norm."""
        ops.add_rms_norm(x, residual, self.weight, self.eps, out, self.offset, inner.weight)

    def add_parts(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """`add` of the sum of all ranks' x; x may be overwritten."""
        assert self._group is not None
        self._group.add_rms_norm(x, residual, self.weight, self.eps, out, self.offset)

    def destinations(self) -> Destinations:
        return {
            f"{self._name}.weight": Destination.whole(self.weight, dummy_mean=1.0 - self.offset)
        }
