"""How the matrices of a layer's experts are stored and multiplied; the counterpart of schemes.py.
The matrices of all experts of a layer are stacked in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pyserve.model.destination import Destinations, row_destinations
from pyserve.model.placement import Placement, Rows, Shard
from pyserve.model.quantised_scheme import QuantisedScheme
from pyserve.model.schemes import SCHEMES, scheme_of_all
from pyserve.ops import experts, quantised
from pyserve.ops.experts import Routing


class ExpertsScheme(Protocol):
    """The matrices [sum of rows, columns.size] of all experts; made and loaded like a Scheme."""

    @property
    def nbytes(self) -> int:
        """Bytes of all experts' matrices on this rank."""

    @property
    def num_params(self) -> int:
        """Number of parameters of all experts on this rank."""

    def __call__(self, x: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
        """As ops.experts.grouped_linear."""

    def silu_mul(
        self, x: torch.Tensor, routing: Routing, out: torch.Tensor, sorted_x: torch.Tensor
    ) -> None:
        """As ops.experts.grouped_linear_silu_mul."""

    def destinations(self) -> Destinations: ...


def make_experts(
    rows: Sequence[Sequence[Rows]], columns: Shard, placement: Placement
) -> ExpertsScheme:
    """Make the matrices of all experts.

    rows     for each expert, the modules whose rows its matrix has.
    columns  this rank's columns, the same for all.

    Raises ConfigError if some of the modules are quantised and others are not.
    """
    scheme = SCHEMES[scheme_of_all((part.name for own in rows for part in own), placement)]
    if issubclass(scheme, QuantisedScheme):
        return QuantisedExperts(scheme, rows, columns, placement)
    return DenseExperts(rows, columns, placement)


class DenseExperts:
    """Plain matrices: `weight` is [num_experts, sum of rows, columns.size]."""

    __slots__ = ("weight", "_rows", "_columns")

    def __init__(
        self, rows: Sequence[Sequence[Rows]], columns: Shard, placement: Placement
    ) -> None:
        self._rows, self._columns = rows, columns
        shape = len(rows), sum(part.size for part in rows[0]), columns.size
        self.weight = torch.empty(shape, dtype=placement.dtype, device=placement.device)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def num_params(self) -> int:
        return self.weight.numel()

    def __call__(self, x: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
        experts.grouped_linear(x, self.weight, routing, out)

    def silu_mul(
        self, x: torch.Tensor, routing: Routing, out: torch.Tensor, sorted_x: torch.Tensor
    ) -> None:
        experts.grouped_linear_silu_mul(x, self.weight, routing, out, sorted_x)

    def destinations(self) -> Destinations:
        destinations: Destinations = {}
        for matrix, rows in zip(self.weight, self._rows, strict=True):
            destinations |= row_destinations("weight", matrix, rows, self._columns)
        return destinations


class QuantisedExperts:
    """Quantised matrices: `matrix` holds all experts; each item of `each` loads one of them."""

    __slots__ = ("matrix", "each", "_num_params", "_placement")

    def __init__(
        self, scheme: type[QuantisedScheme], rows: Sequence[Sequence[Rows]], columns: Shard,
        placement: Placement,
    ) -> None:  # fmt: skip
        self._placement = placement
        self._num_params = len(rows) * sum(part.size for part in rows[0]) * columns.size
        self.matrix, self.each = scheme.stacked(rows, columns, placement)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    @property
    def num_params(self) -> int:
        return self._num_params

    def __call__(self, x: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
        quantised.grouped_linear(x, self.matrix, routing, out, self._scratch_of(x))

    def silu_mul(
        self, x: torch.Tensor, routing: Routing, out: torch.Tensor, sorted_x: torch.Tensor
    ) -> None:
        scratch = self._scratch_of(x)
        quantised.grouped_linear_silu_mul(x, self.matrix, routing, out, sorted_x, scratch)

    def _scratch_of(self, x: torch.Tensor) -> torch.Tensor:
        return self._placement.scratch.of(x.dtype, x.device)

    def destinations(self) -> Destinations:
        destinations: Destinations = {}
        for matrix in self.each:
            destinations |= matrix.destinations()
        return destinations
