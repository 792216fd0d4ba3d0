"""Destination: where one tensor of the checkpoint goes. Layers make them, the loader fills them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True, frozen=True)
class Destination:
    """A contiguous view of a parameter, of the shape the tensor has in the checkpoint.

    dummy_mean   what the weights scatter around when there is no checkpoint to load.
    """

    view: torch.Tensor
    dummy_mean: float = 0.0


Destinations = dict[str, Destination]  # by the tensor's name in the checkpoint
