"""Destination: where one tensor of the checkpoint goes. Layers make them, the loader fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them


class Part(NamedTuple):
    """A slice of the tensor, as long as `view` along `dim` and whole along the others.

    view   of a parameter, of as many dimensions as the tensor; it need not be contiguous.
    dim    0 or 1.
    start  where the slice begins along it.
    """

    view: torch.Tensor
    dim: int = 0
    start: int = 0


@dataclass(slots=True, frozen=True)
class Destination:
    """A tensor of the checkpoint, which of its parts are wanted, and where they go.

    shape       of the tensor.
    parts       none where another rank holds it.
    dtypes      it may be stored in; converted to that of the views.
    dummy_mean  what the weights scatter around when there is no checkpoint to load.
    finish      turns what was loaded into what is computed with. Called once when everything is
                there, also where several tensors name it.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...] = FLOATS
    dummy_mean: float = 0.0
    finish: Callable[[], None] | None = None

    @classmethod
    def whole(cls, view: torch.Tensor, *, dummy_mean: float = 0.0) -> Destination:
        """All of the tensor goes to `view`."""
        return cls(tuple(view.shape), (Part(view),), dummy_mean=dummy_mean)

    @property
    def view(self) -> torch.Tensor:
        """Where a tensor goes that has one part."""
        (part,) = self.parts
        return part.view

    @property
    def num_elements(self) -> int:
        """Held here."""
        return sum(part.view.numel() for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Held here."""
        return sum(part.view.nbytes for part in self.parts)


Destinations = dict[str, Destination]  # by the tensor's name in the checkpoint


def finish_loading(destinations: Iterable[Destination]) -> None:
    """Call what each of them names as `finish`, once each."""
    for finish in dict.fromkeys(destination.finish for destination in destinations):
        if finish is not None:
            finish()
