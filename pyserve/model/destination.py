"""Destination: where one tensor of the checkpoint is loaded to. Layers make Destinations, and the
loader fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from pyserve.model.placement import Rows, Shard

FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them


class Part(NamedTuple):
    """A slice of a checkpoint tensor along one dimension, and the view that it is copied to.

    view   view of a parameter, with as many dimensions as the tensor; it need not be contiguous.
           Its size along `dim` is the length of the slice.
    dim    0 or 1: the dimension that is sliced.
    start  where the slice begins along `dim`.
    """

    view: torch.Tensor
    dim: int = 0
    start: int = 0


class Sink(NamedTuple):
    """Receives a checkpoint tensor that must be converted, not only copied.

    put         called as put(index of the first row, rows) for consecutive rows, in ascending
                order. The rows are in the stored dtype, on the device of the parameters, and valid
                only during the call. Raises CheckpointError, without the tensor's name.
    row_step    the number of rows in each call is a multiple of this, except in the last one.
    num_bytes   bytes of the parameters that the tensor becomes, on this rank.
    num_params  parameters of the model that the tensor holds.
    """

    put: Callable[[int, torch.Tensor], None]
    row_step: int = 1
    num_bytes: int = 0
    num_params: int = 0


@dataclass(slots=True, frozen=True)
class Destination:
    """One tensor of the checkpoint, and where it goes.

    shape       shape of the stored tensor.
    parts       its slices and where they are copied; () if only other ranks hold it or a sink
                takes it.
    dtypes      dtypes in which it may be stored; parts are converted to the dtype of their view.
    dummy_mean  mean of the random weights with load_format "dummy".
    finish      called after all tensors are loaded, to convert the parameters to the form that is
                computed with; only once, even if several tensors name it.
    sink        takes the whole tensor instead of parts.
    is_optional the checkpoint may lack the tensor.
    dummy       fills in random weights with load_format "dummy" if filling the parts with normal
                noise would not do; gets a generator on the parameters' device.
    is_squeezed the stored shape may differ by dimensions of size 1.
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
        """The Destination of a tensor that goes to `view` as a whole."""
        return cls(tuple(view.shape), (Part(view),), dummy_mean=dummy_mean)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor of that shape is right."""
        if not self.is_squeezed:
            return shape == self.shape
        return [size for size in shape if size != 1] == [size for size in self.shape if size != 1]

    @property
    def view(self) -> torch.Tensor:
        """The view of a Destination with exactly one part."""
        (part,) = self.parts
        return part.view

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters that it fills, on this rank."""
        if self.sink is not None:
            return self.sink.num_bytes
        return sum(part.view.nbytes for part in self.parts)

    @property
    def num_params(self) -> int:
        """Parameters of the model that the whole tensor holds, on all ranks."""
        return prod(self.shape) if self.sink is None else self.sink.num_params


Destinations = dict[str, Destination]  # by the tensor's name in the checkpoint


def finish_loading(destinations: Iterable[Destination]) -> None:
    """Call each distinct `finish` once."""
    for finish in dict.fromkeys(destination.finish for destination in destinations):
        if finish is not None:
            finish()


def row_destinations(
    kind: str, parameter: torch.Tensor, rows: Sequence[Rows], columns: Shard | None = None
) -> Destinations:
    """The Destinations of a (fused) parameter [rows] or [rows, columns], by tensor name.

    kind     the end of the tensors' names, behind the module's name: "weight" or "bias".
    rows     the modules that stand one after the other in the parameter; several Rows of one name
             become parts of one tensor.
    columns  this rank's columns; None: the parameter has one dimension.
    """
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
