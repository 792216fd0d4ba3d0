"""RMSNorm (Zhang and Sennrich 2019), alone or fused with the residual add before it."""

from __future__ import annotations

import torch

from pyserve import ops
from pyserve.model.destination import Destination, Destinations
from pyserve.model.layer_config import NormConfig
from pyserve.model.placement import Placement


class RMSNorm:
    """x / rms(x) * (weight + offset) over the last dimension; accumulates in float32.

    The weight stays as it is stored: 1 + w would be rounded to the dtype once more.
    """

    __slots__ = ("weight", "eps", "offset", "_name", "_group")

    def __init__(self, name: str, size: int, config: NormConfig, placement: Placement) -> None:
        self._name = name
        self._group = placement.group
        self.eps = config.eps
        self.offset = config.offset
        self.weight = torch.empty(size, dtype=placement.dtype, device=placement.device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x [..., size] -> out, of the same shape; it may be x itself."""
        ops.rms_norm(x, self.weight, self.eps, out, self.offset)

    def read(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """`add` where x is in the residual already, or where there is none: in the first layer."""
        ops.rms_norm(residual, self.weight, self.eps, out, self.offset)

    def add(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """residual += x in place, then the norm of residual -> out."""
        ops.add_rms_norm(x, residual, self.weight, self.eps, out, self.offset)

    def add_normed(
        self, inner: RMSNorm, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor
    ) -> None:
        """`add` of the norm of x by `inner`, which has the same eps and offset."""
        ops.add_rms_norm(x, residual, self.weight, self.eps, out, self.offset, inner.weight)

    def add_parts(self, x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
        """`add` of the sum of all ranks' x, which may be overwritten."""
        assert self._group is not None
        self._group.add_rms_norm(x, residual, self.weight, self.eps, out, self.offset)

    def destinations(self) -> Destinations:
        return {
            f"{self._name}.weight": Destination.whole(self.weight, dummy_mean=1.0 - self.offset)
        }
