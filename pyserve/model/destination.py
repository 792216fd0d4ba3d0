"""Destination: where one tensor of the checkpoint goes. Layers make them, the loader fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from pyserve.model.placement import Rows, Shard

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
    dummy       fills in made-up weights where the parts would not do with those of all others,
                from a generator there.
    is_squeezed sizes of 1 in the shape may be left out, or more of them be there.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dtypes: tuple[str, ...] = FLOATS
    dummy_mean: float = 0.0
    finish: Callable[[], None] | None = None
    sink: Sink | None = None
    is_optional: bool = False
    dummy: Callable[[torch.Generator], None] | None = None
    is_squeezed: bool = False

    @classmethod
    def whole(cls, view: torch.Tensor, *, dummy_mean: float = 0.0) -> Destination:
        """All of the tensor goes to `view`."""
        return cls(tuple(view.shape), (Part(view),), dummy_mean=dummy_mean)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape can be taken."""
        if not self.is_squeezed:
            return shape == self.shape
        return [size for size in shape if size != 1] == [size for size in self.shape if size != 1]

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


def row_destinations(
    kind: str, parameter: torch.Tensor, rows: Sequence[Rows], columns: Shard | None = None
) -> Destinations:
    """Of a parameter [rows] or [rows, columns]; `kind` is what follows the module's name in the
    checkpoint. Rows of one name become parts of one tensor."""
    destinations: Destinations = {}
    begin = 0
    for part in rows:
        view = parameter.narrow(0, begin, part.num_stored)
        begin += part.size
        name = f"{part.name}.{kind}"
        shape: tuple[int, ...] = (part.whole,)
        piece = Part(view, 0, part.start)
        if columns is not None:
            shape = part.whole, columns.whole
            if columns.size != columns.whole:
                piece = Part(view, 1, columns.start)
        before = destinations[name].parts if name in destinations else ()
        destinations[name] = Destination(shape, (*before, piece) if part.num_stored else before)
    return destinations
