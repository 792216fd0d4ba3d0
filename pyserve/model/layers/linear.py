"""Linear: a matrix of the model, or several of the checkpoint fused into one."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pyserve import ops
from pyserve.model.destination import Destination, Destinations


class Linear:
    """y = x W^T + b, dense.

    Owns its parameters and its scheme: what the checkpoint calls them and how they are stored.
    `parts` maps the checkpoint's modules, in the order their outputs are stacked, to their output
    sizes. A rule that shards the outputs or the inputs over ranks divides sizes here, and takes
    its part of each tensor in `destinations`; nothing outside knows.
    """

    __slots__ = ("weight", "bias", "_parts")

    def __init__(
        self,
        parts: Mapping[str, int],
        in_features: int,
        *,
        has_bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        out_features = sum(parts.values())
        self._parts = parts
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if has_bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, in_features] -> [num_tokens, out_features]"""
        return ops.linear(x, self.weight, self.bias)

    def destinations(self) -> Destinations:
        destinations: Destinations = {}
        start = 0
        for name, size in self._parts.items():
            destinations[f"{name}.weight"] = Destination(self.weight.narrow(0, start, size))
            if self.bias is not None:
                destinations[f"{name}.bias"] = Destination(self.bias.narrow(0, start, size))
            start += size
        return destinations
