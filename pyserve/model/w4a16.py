"""W4A16: the Scheme of a matrix of 4-bit integers, see ops/w4a16.py; computed in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pyserve.errors import ConfigError
from pyserve.model.destination import Destination, Destinations, Sink
from pyserve.model.placement import Placement, Rows, Shard
from pyserve.model.w4a16_formats import Sizes, stored_tensors
from pyserve.ops import quantised, w4a16

# Of the matrix as plain numbers, held while many rows are multiplied: so much stays in the cache.
SCRATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 24 * 2**20}
DUMMY_STD = 0.02  # as in loader.py


class Piece(NamedTuple):
    """Rows of a module's matrix that are held: `size` from `start` on, as those from `row` on."""

    start: int
    size: int
    row: int


class W4A16:
    """`packed` is what is computed with, int32. It is or-ed together from the tensors of the
    checkpoint, as each arrives.
    """

    __slots__ = ("packed", "_rows", "_columns", "_placement", "_group_size", "_shape")

    def __init__(self, rows: Sequence[Rows], columns: Shard, placement: Placement) -> None:
        assert placement.quantization is not None
        self._rows, self._columns, self._placement = rows, columns, placement
        names = dict.fromkeys(part.name for part in rows)
        try:
            self._group_size = placement.quantization.group_of(columns.whole)
        except ConfigError as error:
            raise ConfigError(f"{next(iter(names))} {error}") from None
        unit = w4a16.unit_columns(self._group_size)
        if columns.size != columns.whole and columns.size % unit:
            raise ConfigError(
                f"{next(iter(names))}: {placement.tp_size} ranks cannot share its {columns.whole} "
                f"columns in units of {unit}"
            )
        for part in rows:
            if part.whole % w4a16.NIBBLES and placement.quantization.storage != "plain":
                raise ConfigError(f"{part.name} has {part.whole} rows, which are no multiple of 8")
        self._shape = sum(part.size for part in rows), columns.size
        shape = w4a16.packed_shape(*self._shape, self._group_size)
        self.packed = torch.zeros(shape, dtype=torch.int32, device=placement.device)
        strip_bytes = w4a16.STRIP_ROWS * columns.size * placement.dtype.itemsize
        kind = "cpu" if placement.device.type == "cpu" else "cuda"
        num_strips = min(shape[0], max(1, SCRATCH_BYTES[kind] // strip_bytes))
        placement.scratch.reserve(num_strips * strip_bytes)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def plain(self) -> torch.Tensor:
        matrix = self.packed.new_empty(self._shape, dtype=self._placement.dtype)
        quantised.dequantise_w4a16(self.packed, matrix)
        return matrix

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        quantised.linear_w4a16(x, self.packed, bias, out, self._scratch_of(x))

    def add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        quantised.linear_add_w4a16(x, self.packed, bias, residual, self._scratch_of(x))

    def silu_mul(
        self, x: torch.Tensor, bias: torch.Tensor | None, gate_up: torch.Tensor, out: torch.Tensor
    ) -> None:
        quantised.linear_silu_mul_w4a16(x, self.packed, bias, out, gate_up, self._scratch_of(x))

    @property
    def is_fusing(self) -> bool:
        return self.packed.is_cuda  # on a CPU it is not measured

    @property
    def is_norming(self) -> bool:
        """Gate and up may not share a strip of rows; the parts of others need not, either."""
        return all(part.size % w4a16.STRIP_ROWS == 0 for part in self._rows)

    def add_for_norm(
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor,
        norm_weight: torch.Tensor, scaled: torch.Tensor, squares: torch.Tensor,
    ) -> None:  # fmt: skip
        quantised.linear_add_w4a16_for_norm(
            x, self.packed, bias, residual, norm_weight, scaled, squares
        )  # fmt: skip

    def of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None:  # fmt: skip
        quantised.linear_w4a16_of_scaled(x, self.packed, bias, out, squares, eps)

    def silu_mul_of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None:  # fmt: skip
        quantised.linear_silu_mul_w4a16_of_scaled(x, self.packed, bias, out, squares, eps)

    def _scratch_of(self, x: torch.Tensor) -> torch.Tensor:
        return self._placement.scratch.of(x.dtype, x.device)

    def destinations(self) -> Destinations:
        """The bytes of the whole matrix count with the integers of its first module."""
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

    def _pieces(self) -> dict[str, list[Piece]]:
        """What is held of each module."""
        pieces: dict[str, list[Piece]] = {}
        row = 0
        for part in self._rows:
            here = pieces.setdefault(part.name, [])
            if part.num_stored:
                here.append(Piece(part.start, part.num_stored, row))
            row += part.size
        return pieces

    def _dummy(self, generator: torch.Generator) -> None:
        w4a16.fill_with_noise(self.packed, *self._shape, DUMMY_STD, generator)


class _Into:
    """Of a module's matrix, whole, what is held here: goes to `packed`."""

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
        """(row, column, part) of what is held of values [rows, columns / width]."""
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
