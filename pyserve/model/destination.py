"""Destination: where one tensor of the checkpoint goes. Layers make them, the loader fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
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


class Sink(NamedTuple):
    """Takes a tensor that is more than copied: as it is stored, whole rows at a time.

    put         (index of the first row, rows on the device of the parameters), in ascending order;
                keeps nothing of them. Raises CheckpointError, without the tensor's name.
    row_step    rows come in multiples of it, but for the last ones.
    num_bytes   what is kept of it, on this rank; `num_params` numbers of the model are in it.
    """

    put: Callable[[int, torch.Tensor], None]
    row_step: int = 1
    num_bytes: int = 0
    num_params: int = 0


@dataclass(slots=True, frozen=True)
class Destination:
    """A tensor of the checkpoint, which of its parts are wanted, and where they go.

    shape       of the tensor.
    parts       none where another rank holds it, or a `sink` takes it.
    dtypes      it may be stored in; converted to that of the views.
    sink        takes all of it.
    is_optional whether a checkpoint may lack it.
    dummy_mean  what the weights scatter around when there is no checkpoint to load.
    finish      turns what was loaded into what is computed with. Called once when everything is
                there, also where several tensors name it.
    dummy       fills in made-up weights of a matrix that has a sink, from a generator there.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...] = FLOATS
    dummy_mean: float = 0.0
    finish: Callable[[], None] | None = None
    sink: Sink | None = None
    is_optional: bool = False
    dummy: Callable[[torch.Generator], None] | None = None

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
    def nbytes(self) -> int:
        """Held here."""
        if self.sink is not None:
            return self.sink.num_bytes
        return sum(part.view.nbytes for part in self.parts)

    @property
    def num_params(self) -> int:
        """Numbers of the model that the tensor holds, wherever."""
        return prod(self.shape) if self.sink is None else self.sink.num_params


Destinations = dict[str, Destination]  # by the tensor's name in the checkpoint


def finish_loading(destinations: Iterable[Destination]) -> None:
    """Call what each of them names as `finish`, once each."""
    for finish in dict.fromkeys(destination.finish for destination in destinations):
        if finish is not None:
            finish()
