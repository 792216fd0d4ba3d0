"""FP8: the Scheme of a matrix of 8-bit floats (e4m3) with scales; see ops/fp8.py.

Activations are 16-bit, whatever the checkpoint says about them. In large steps on a card with FP8
matrix units they are rounded to 8 bits on the fly, unless the checkpoint's quantisation is of the
weights only. The server logs which of these applies (Quantization.remarks).

A module X with a matrix [n, k] is stored as

    X.weight            F8_E4M3 [n, k]
    X.weight_scale_inv  [ceil(n / 128), ceil(k / 128)], if there is a scale for each block. Weights
                        are multiplied by it in spite of the name (DeepSeek-V3, README_WEIGHTS.md).
                        compressed-tensors calls it weight_scale.
    X.weight_scale      [n, 1] or [1], if there is a scale for each row or for the whole matrix
    X.input_scale       [1], a scale for activations, which is not used

Where method "fp8" has no blocks (Ministral 3), transformers calls the last two weight_scale_inv and
activation_scale.

With storage "fp8-plain", X.weight has 16- or 32-bit floats, which are rounded to 8 bits with a
scale for each row while loading.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from math import gcd

import torch

from pyserve.errors import ConfigError
from pyserve.model.destination import (
    FLOATS,
    Destination,
    Destinations,
    Part,
    Sink,
    row_destinations,
)
from pyserve.model.quantised_scheme import DUMMY_STD, Piece, QuantisedScheme
from pyserve.model.quantization import BLOCK, Quantization
from pyserve.ops import fp8, quantised

WEIGHT_DTYPES = ("F8_E4M3",)
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


class Fp8(QuantisedScheme):
    """`weight` is E4M3 [n, k] and `scales` is float32, laid out as in ops/fp8.py."""

    __slots__ = ()

    matrix: quantised.Fp8Matrix

    def _check(self) -> None:
        columns, name = self._columns, self._rows[0].name
        unit = self._quantization.unit_columns(columns.whole)
        if columns.size != columns.whole and columns.size % unit:
            raise ConfigError(
                f"{name}: {self._placement.tp_size} ranks cannot share its {columns.whole} columns "
                f"in blocks of {unit}"
            )

    @property
    def _quantization(self) -> Quantization:
        assert self._placement.quantization is not None
        return self._placement.quantization

    @property
    def _has_blocks(self) -> bool:
        return self._quantization.granularity == "block"

    def _room(self, device: torch.device, *count: int) -> quantised.Fp8Matrix:
        n, k = self._shape
        scale_rows, scale_columns = 1, max(k, 1)
        if self._has_blocks:
            pieces = chain.from_iterable(self._pieces().values())
            begins = (begin for part in pieces for begin in (part.row, part.start))
            scale_rows, scale_columns = gcd(BLOCK[0], *begins), BLOCK[1]
        shape = *count, -(-n // scale_rows), -(-k // scale_columns)
        is_weight_only = self._quantization.is_weight_only
        kind = quantised.Fp8WeightMatrix if is_weight_only else quantised.Fp8Matrix
        return kind(
            torch.zeros((*count, n, k), dtype=torch.uint8, device=device),
            torch.zeros(shape, device=device),
            scale_rows,
            scale_columns,
        )

    @property
    def is_norming(self) -> bool:
        """As NormingScheme.is_norming: the kernels on a card read 16 bytes of a row at a time."""
        return self._shape[1] % 16 == 0

    @property
    def weight(self) -> torch.Tensor:
        """E4M3 [n, k]."""
        return self.matrix.weight.view(fp8.E4M3)

    @property
    def scales(self) -> torch.Tensor:
        """float32 [ceil(n / scale_rows), ceil(k / scale_columns)]."""
        return self.matrix.scales

    def destinations(self) -> Destinations:
        """Where the tensors of its modules go; the first module counts the bytes of all scales."""
        weights = row_destinations("weight", self.weight, self._rows, self._columns)
        if self._quantization.storage == "fp8-plain":
            return self._plain_destinations(weights)
        destinations: Destinations = {}
        num_bytes = self.scales.nbytes
        for name, pieces in self._pieces().items():
            place = weights[f"{name}.weight"]
            dummy = partial(self._dummy, place.parts)
            destinations[f"{name}.weight"] = replace(place, dtypes=WEIGHT_DTYPES, dummy=dummy)
            shape = self._shape_of_scales(place.shape)
            destinations[f"{name}.{self._quantization.scale_name}"] = Destination(
                shape,
                (),
                SCALE_DTYPES,
                sink=Sink(partial(self._put_scales, pieces, place.shape[0]), num_bytes=num_bytes),
                is_squeezed=not self._has_blocks,
            )
            if self._quantization.has_input_scales:
                destinations[f"{name}.input_scale"] = Destination(
                    (1,), (), SCALE_DTYPES, sink=Sink(_ignore), is_optional=True, is_squeezed=True
                )
            num_bytes = 0
        return destinations

    def _shape_of_scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        n, k = shape
        if self._has_blocks:
            return -(-n // BLOCK[0]), -(-k // BLOCK[1])
        return (n, 1) if self._quantization.granularity == "channel" else (1,)

    def _put_scales(
        self, pieces: list[Piece], num_rows: int, first: int, stored: torch.Tensor
    ) -> None:
        """Put a module's stored scales into `scales`, as Sink.put.

        pieces    the rows of the module that are held here.
        num_rows  rows of the module's whole matrix.
        first     index of the first row of `stored` within the stored scales.
        """
        stored = stored.reshape(len(stored), -1).float()
        unit = {"block": BLOCK[0], "channel": 1, "tensor": num_rows}[self._quantization.granularity]
        if self._has_blocks:
            begin = self._columns.start // BLOCK[1]
            stored = stored[:, begin : begin + self.scales.shape[1]]
        step = self.matrix.scale_rows
        for piece in pieces:
            # For each row of scales that is held here: the stored row that it comes from.
            held = torch.arange(piece.start, piece.start + piece.size, step, device=stored.device)
            source = held // unit - first
            here = (source >= 0) & (source < len(stored))
            rows = piece.row // step + torch.arange(len(held), device=stored.device)
            self.scales[rows[here]] = stored[source[here]]

    def _dummy(self, parts: tuple[Part, ...], generator: torch.Generator) -> None:
        for part in parts:
            unit = fp8.fill_with_noise(part.view, generator)
            self.scales.fill_(unit * DUMMY_STD)

    def _plain_destinations(self, weights: Destinations) -> Destinations:
        destinations: Destinations = {}
        num_bytes = self.nbytes
        for name, pieces in self._pieces().items():
            place = weights[f"{name}.weight"]
            put = partial(self._put_plain, pieces)
            destinations[f"{name}.weight"] = Destination(
                place.shape,
                (),
                FLOATS,
                sink=Sink(put, num_bytes=num_bytes, num_params=place.num_params),
                dummy=partial(self._dummy, (Part(self.weight),)) if num_bytes else None,
            )
            num_bytes = 0
        return destinations

    def _put_plain(self, pieces: list[Piece], first: int, rows: torch.Tensor) -> None:
        """Round rows of floats to 8 bits, as Sink.put. A row's scale is that of the whole row, even
        if only some of its columns are held here."""
        weight, scales = fp8.quantised(rows)
        weight = weight.view(torch.uint8).narrow(1, self._columns.start, self._columns.size)
        for piece in pieces:
            begin = max(first, piece.start)
            end = min(first + len(rows), piece.start + piece.size)
            if begin < end:
                at = piece.row + begin - piece.start
                self.matrix.weight[at : at + end - begin] = weight[begin - first : end - first]
                self.scales[at : at + end - begin, 0] = scales[begin - first : end - first]


def _ignore(_row: int, _values: torch.Tensor) -> None:
    """The Sink.put of a tensor that is known but not used."""
