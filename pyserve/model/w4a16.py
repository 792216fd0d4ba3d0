"""W4A16: the Scheme of a matrix of 4-bit integers with 16-bit activations; see ops/w4a16.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyserve.errors import ConfigError
from pyserve.model.destination import Destination, Destinations, Sink
from pyserve.model.placement import Shard
from pyserve.model.quantised_scheme import DUMMY_STD, Piece, QuantisedScheme
from pyserve.model.w4a16_formats import Sizes, stored_tensors
from pyserve.ops import quantised, w4a16


class W4A16(QuantisedScheme):
    """`packed` is the int32 matrix of ops/w4a16.py. The checkpoint's tensors are or-ed into it one
    by one as they are loaded, in any order.
    """

    __slots__ = ("_group_size",)

    matrix: quantised.W4A16Matrix

    def _check(self) -> None:
        columns, quantization = self._columns, self._placement.quantization
        assert quantization is not None
        first = self._rows[0].name
        try:
            self._group_size = quantization.group_of(columns.whole)
        except ConfigError as error:
            raise ConfigError(f"{first} {error}") from None
        unit = w4a16.unit_columns(self._group_size)
        if columns.size != columns.whole and columns.size % unit:
            raise ConfigError(
                f"{first}: {self._placement.tp_size} ranks cannot share its {columns.whole} "
                f"columns in units of {unit}"
            )
        for part in self._rows:
            if part.whole % w4a16.NIBBLES and quantization.storage != "plain":
                raise ConfigError(f"{part.name} has {part.whole} rows, which are no multiple of 8")

    def _room(self, device: torch.device, *count: int) -> quantised.W4A16Matrix:
        shape = *count, *w4a16.packed_shape(*self._shape, self._group_size)
        return quantised.W4A16Matrix(torch.zeros(shape, dtype=torch.int32, device=device))

    @property
    def packed(self) -> torch.Tensor:
        return self.matrix.packed

    @property
    def stored(self) -> torch.Tensor:
        return self.matrix.packed

    @property
    def is_norming(self) -> bool:
        """Whether no two parts share a strip of rows, as gate and up must not. Other fused matrices
        would not need it."""
        return all(part.size % w4a16.STRIP_ROWS == 0 for part in self._rows)

    def destinations(self) -> Destinations:
        """Where the tensors of its modules go; the first tensor of the first module counts the
        bytes of the whole matrix."""
        quantization = self._placement.quantization
        assert quantization is not None
        destinations: Destinations = {}
        num_bytes = self.packed.nbytes
        for name, pieces in self._pieces().items():
            (n,) = {part.whole for part in self._rows if part.name == name}
            k = self._columns.whole
            into = _Into(self.packed, pieces, self._columns, self._group_size)
            sizes = Sizes(n, k, self._group_size, quantization.has_zeros)
            num_params = n * k
            for stored in stored_tensors(quantization.storage, sizes, into):
                is_first = num_params > 0
                destinations[f"{name}.{stored.kind}"] = Destination(
                    stored.shape,
                    (),
                    stored.dtypes,
                    sink=Sink(stored.put, stored.row_step, num_bytes, num_params),
                    is_optional=stored.is_optional,
                    dummy=self._dummy if is_first and num_bytes else None,
                )
                num_bytes = num_params = 0
        return destinations

    def _dummy(self, generator: torch.Generator) -> None:
        w4a16.fill_with_noise(self.packed, *self._shape, DUMMY_STD, generator)


class _Into:
    """Implements w4a16_formats.Matrix: puts this rank's part of a module's matrix into `packed`."""

    def __init__(
        self, packed: torch.Tensor, pieces: Sequence[Piece], columns: Shard, group_size: int
    ) -> None:
        self._packed, self._pieces = packed, pieces
        self._columns, self._group_size = columns, group_size

    def add_words(self, row: int, column: int, words: torch.Tensor) -> None:
        for here, first, part in self._held(row, column, words, w4a16.NIBBLES):
            w4a16.add_words(self._packed, here, first, part)

    def add_scales(self, row: int, group: int, scales: torch.Tensor) -> None:
        size = self._group_size
        for here, first, part in self._held(row, group * size, scales, size):
            w4a16.add_scales(self._packed, here, first // size, part)

    def add_zeros(self, row: int, group: int, zeros: torch.Tensor) -> None:
        size = self._group_size
        for here, first, part in self._held(row, group * size, zeros, size):
            w4a16.add_zeros(self._packed, here, first // size, part)

    def _held(
        self, row: int, column: int, values: torch.Tensor, width: int
    ) -> list[tuple[int, int, torch.Tensor]]:
        """Clip values [rows, columns / width] at (row, column) to what is held here.

        Returns (row, column, part of values) for each piece, with positions in `packed`.
        """
        begin = max(column, self._columns.start)
        end = min(column + width * values.shape[1], self._columns.start + self._columns.size)
        if begin >= end:
            return []
        values = values[:, (begin - column) // width : (end - column) // width]
        held = []
        for piece in self._pieces:
            first = max(row, piece.start)
            last = min(row + len(values), piece.start + piece.size)
            if first < last:
                here = piece.row + first - piece.start
                part = values[first - row : last - row]
                held.append((here, begin - self._columns.start, part))
        return held
