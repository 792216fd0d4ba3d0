"""QuantisedScheme: what the Schemes of quantised matrices have in common.

Few rows of x are multiplied by the quantised matrix directly; for many rows the matrix is first
dequantised, slice by slice. See ops/quantised.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import torch

from pyserve.model.destination import Destinations
from pyserve.model.placement import META, Placement, Rows, Scratch, Shard
from pyserve.ops import quantised

# Size of a dequantised slice of the matrix: it should stay in the cache until it is multiplied.
SCRATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 24 * 2**20}
DUMMY_STD = 0.02  # as in loader.py


class Piece(NamedTuple):
    """Rows of a module that this rank holds.

    start, size  the range [start, start + size) of the module's rows.
    row          where these rows begin in the Linear's matrix.
    """

    start: int
    size: int
    row: int


class QuantisedScheme:
    """Base of Schemes; subclasses allocate and load the matrix.

    matrix   the quantised matrix; of an expert, a view of the tensors that hold all experts.
    """

    __slots__ = ("matrix", "_rows", "_columns", "_placement", "_shape")

    matrix: quantised.Matrix

    def __init__(
        self, rows: Sequence[Rows], columns: Shard, placement: Placement,
        matrix: quantised.Matrix | None = None,
    ) -> None:  # fmt: skip
        self._rows, self._columns, self._placement = rows, columns, placement
        self._shape = sum(part.size for part in rows), columns.size
        self._check()
        self.matrix = self._room(placement.device) if matrix is None else matrix
        kind = "cpu" if placement.device.type == "cpu" else "cuda"
        itemsize = placement.dtype.itemsize
        held = quantised.scratch_rows(self.matrix, *self._shape, SCRATCH_BYTES[kind] // itemsize)
        placement.scratch.reserve(held * columns.size * itemsize)

    @classmethod
    def stacked(
        cls, rows: Sequence[Sequence[Rows]], columns: Shard, placement: Placement
    ) -> tuple[quantised.Matrix, list[Self]]:
        """Allocate matrices of one shape in one stacked Matrix; also returns a Scheme for each."""
        shapes = cls(rows[0], columns, replace(placement, device=META, scratch=Scratch()))
        matrix = shapes._room(placement.device, len(rows))
        made = [
            cls(own, columns, placement, matrix.of_expert(index)) for index, own in enumerate(rows)
        ]
        return matrix, made

    def _check(self) -> None:
        """Raise ConfigError if a matrix of this shape cannot be stored or shared this way."""
        raise NotImplementedError

    def _room(self, device: torch.device, *count: int) -> quantised.Matrix:
        """Allocate the matrix, or a stack of `count` matrices if given, filled with zeros."""
        raise NotImplementedError

    def destinations(self) -> Destinations:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        quantised.linear(x, self.matrix, bias, out, self._scratch_of(x))

    def add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        quantised.linear_add(x, self.matrix, bias, residual, self._scratch_of(x))

    def silu_mul(
        self, x: torch.Tensor, bias: torch.Tensor | None, gate_up: torch.Tensor, out: torch.Tensor
    ) -> None:
        quantised.linear_silu_mul(x, self.matrix, bias, out, gate_up, self._scratch_of(x))

    @property
    def is_fusing(self) -> bool:
        return self._placement.device.type == "cuda"  # nobody has measured it on a CPU

    @property
    def is_norming(self) -> bool:
        return False

    def add_for_norm(
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor,
        norm_weight: torch.Tensor, scaled: torch.Tensor, squares: torch.Tensor,
    ) -> None:  # fmt: skip
        quantised.linear_add_for_norm(x, self.matrix, bias, residual, norm_weight, scaled, squares)

    def of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None:  # fmt: skip
        quantised.linear_of_scaled(x, self.matrix, bias, out, squares, eps)

    def silu_mul_of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None:  # fmt: skip
        quantised.linear_silu_mul_of_scaled(x, self.matrix, bias, out, squares, eps)

    def plain(self) -> torch.Tensor:
        shape, device = self._shape, self._placement.device
        out = torch.empty(shape, dtype=self._placement.dtype, device=device)
        if device != META:
            quantised.dequantise(self.matrix, out)
        return out

    def _scratch_of(self, x: torch.Tensor) -> torch.Tensor:
        return self._placement.scratch.of(x.dtype, x.device)

    def _pieces(self) -> dict[str, list[Piece]]:
        """The rows that this rank holds, by module name."""
        pieces: dict[str, list[Piece]] = {}
        row = 0
        for part in self._rows:
            here = pieces.setdefault(part.name, [])
            if part.num_stored:
                here.append(Piece(part.start, part.num_stored, row))
            row += part.size
        return pieces
