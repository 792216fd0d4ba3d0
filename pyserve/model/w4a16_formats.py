"""The formats in which checkpoints store a matrix [n, k] of 4-bit integers in groups of g columns,
and their conversion to the packed matrix of ops/w4a16.py.

All formats pack 8 integers into an int32, the first in the lowest bits. W = (q - z) * s, with
integers q, zero points z and scales s.

awq-gemm        along n, each 8 rows in the order 0, 2, 4, 6, 1, 3, 5, 7: the second integer of a
                word is row 2. qweight [k, n / 8], qzeros [k / g, n / 8] in the same order, scales
                [k / g, n]. AutoAWQ, awq/modules/linear/gemm.py.
awq-gemv        along k, in order. qweight [n, k / 8]; qzeros [n, w] along the groups, in order,
                scales [n, 8 w], where w is k / g / 8 rounded up, for g = 64 to a multiple of 2, for
                g = 32 of 4. AutoAWQ, awq/modules/linear/gemv.py.
gptq, gptq_v2   along k, in order. qweight [k / 8, n]; qzeros [k / g, n / 8] along n, in order,
                scales [k / g, n], g_idx [k], the group of each column. gptq stores z - 1, of which
                4 bits are left, gptq_v2 z. AutoGPTQ, auto_gptq/nn_modules/qlinear
                (qlinear_tritonv2.py subtracts 1 when it packs); GPTQModel, gptqmodel/utils/model.py
                (convert_gptq_v1_to_v2_format_module adds it). A bias of zeros may be there that the
                model does not have.
pack-quantized  along k, in order, q and z as signed integers plus 8. weight_packed [n, k / 8],
                weight_scale [n, k / g], weight_shape [2]; weight_zero_point [n / 8, k / g] along n
                where they are stored, else z is 8. compressed-tensors, src/compressed_tensors/
                compressors/quantized_compressors/pack_quantized.py.
plain           weight [n, k], of floats: it is rounded to the nearest as it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from pyserve.errors import CheckpointError
from pyserve.model.destination import FLOATS
from pyserve.model.quantization import Storage
from pyserve.ops import w4a16

SCALE_DTYPES = ("F16", "BF16", "F32")
# awq-gemm: the nibble of a word that holds each of 8 rows.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
SYMMETRIC_ZERO = 8


class Matrix(Protocol):
    """Receives parts of a matrix [n, k] in any order, as the functions of ops/w4a16.py do."""

    def add_words(self, row: int, column: int, words: torch.Tensor) -> None: ...

    def add_scales(self, row: int, group: int, scales: torch.Tensor) -> None: ...

    def add_zeros(self, row: int, group: int, zeros: torch.Tensor) -> None: ...


class Stored(NamedTuple):
    """One tensor of a module in the checkpoint.

    kind         the end of the tensor's name, behind the module's name.
    dtypes       dtypes that it may be stored in.
    put          put(index of the first row, rows), as Sink.put.
    row_step     as Sink.row_step.
    is_optional  the checkpoint may lack it.
    """

    kind: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    put: Callable[[int, torch.Tensor], None]
    row_step: int = 1
    is_optional: bool = False


class Sizes(NamedTuple):
    """The shape [n, k] of a matrix, its group size, and whether zero points are stored."""

    n: int
    k: int
    group_size: int
    has_zeros: bool

    @property
    def num_groups(self) -> int:
        """Groups of a row."""
        return self.k // self.group_size

    @property
    def unit_groups(self) -> int:
        """Groups in a unit of ops/w4a16.py."""
        return w4a16.unit_columns(self.group_size) // self.group_size


def stored_tensors(storage: Storage, sizes: Sizes, matrix: Matrix) -> Iterator[Stored]:
    """The tensors of a module in this format, the one with the integers first.

    Their `put`s pass on what is loaded to `matrix`.
    """
    return _FORMATS[storage](sizes, matrix)


def _awq_gemm(sizes: Sizes, matrix: Matrix) -> Iterator[Stored]:
    n, k, num_groups, step = sizes.n, sizes.k, sizes.num_groups, sizes.unit_groups

    def in_order(rows: torch.Tensor) -> torch.Tensor:
        """Restore the order of rows that were permuted within groups of 8."""
        return torch.unflatten(rows, 0, (-1, w4a16.NIBBLES))[:, AWQ_PLACES].flatten(0, 1)

    def words(column: int, rows: torch.Tensor) -> None:
        matrix.add_words(0, column, in_order(w4a16.transposed(rows)))

    def zeros(group: int, rows: torch.Tensor) -> None:
        matrix.add_zeros(0, group, in_order(w4a16.codes_of(rows).t()))

    columns = w4a16.unit_columns(sizes.group_size)
    yield Stored("qweight", (k, n // 8), ("I32",), words, columns)
    yield Stored("qzeros", (num_groups, n // 8), ("I32",), zeros, step)
    yield Stored("scales", (num_groups, n), SCALE_DTYPES, _scales_of_columns(matrix), step)


def _awq_gemv(sizes: Sizes, matrix: Matrix) -> Iterator[Stored]:
    n, k, num_groups = sizes.n, sizes.k, sizes.num_groups
    multiple = max(1, 128 // sizes.group_size)
    width = -(-num_groups // (8 * multiple)) * multiple

    def words(row: int, rows: torch.Tensor) -> None:
        matrix.add_words(row, 0, rows)

    def zeros(row: int, rows: torch.Tensor) -> None:
        matrix.add_zeros(row, 0, w4a16.codes_of(rows)[:, :num_groups])

    def scales(row: int, rows: torch.Tensor) -> None:
        matrix.add_scales(row, 0, rows[:, :num_groups])

    yield Stored("qweight", (n, k // 8), ("I32",), words)
    yield Stored("qzeros", (n, width), ("I32",), zeros)
    yield Stored("scales", (n, width * 8), SCALE_DTYPES, scales)


def _gptq(sizes: Sizes, matrix: Matrix, *, offset: int) -> Iterator[Stored]:
    n, k, num_groups, step = sizes.n, sizes.k, sizes.num_groups, sizes.unit_groups

    def words(row: int, rows: torch.Tensor) -> None:
        matrix.add_words(0, row * w4a16.NIBBLES, rows.t())

    def zeros(group: int, rows: torch.Tensor) -> None:
        matrix.add_zeros(0, group, (w4a16.codes_of(rows) + offset & w4a16.MAX_CODE).t())

    def check_groups(column: int, groups: torch.Tensor) -> None:
        expected = torch.arange(column, column + len(groups), device=groups.device)
        if not torch.equal(groups.long(), expected // sizes.group_size):
            raise CheckpointError(
                "orders columns by activation (act-order), which is not supported"
            )

    def check_bias(_row: int, values: torch.Tensor) -> None:
        if bool(values.any()):
            raise CheckpointError("is a bias, which config.json does not make, and not zero")

    rows = w4a16.unit_columns(sizes.group_size) // w4a16.NIBBLES
    yield Stored("qweight", (k // 8, n), ("I32",), words, rows)
    yield Stored("qzeros", (num_groups, n // 8), ("I32",), zeros, step)
    yield Stored("scales", (num_groups, n), SCALE_DTYPES, _scales_of_columns(matrix), step)
    yield Stored("g_idx", (k,), ("I32", "I64"), check_groups, is_optional=True)
    yield Stored("bias", (n,), FLOATS, check_bias, is_optional=True)


def _gptq_v1(sizes: Sizes, matrix: Matrix) -> Iterator[Stored]:
    return _gptq(sizes, matrix, offset=1)


def _gptq_v2(sizes: Sizes, matrix: Matrix) -> Iterator[Stored]:
    return _gptq(sizes, matrix, offset=0)


def _pack_quantized(sizes: Sizes, matrix: Matrix) -> Iterator[Stored]:
    n, k, num_groups = sizes.n, sizes.k, sizes.num_groups

    def words(row: int, rows: torch.Tensor) -> None:
        matrix.add_words(row, 0, rows)
        if not sizes.has_zeros:
            shape = len(rows), num_groups
            matrix.add_zeros(row, 0, torch.full(shape, SYMMETRIC_ZERO, device=rows.device))

    def zeros(row: int, rows: torch.Tensor) -> None:
        matrix.add_zeros(row * w4a16.NIBBLES, 0, w4a16.codes_of(rows.t()).t())

    def scales(row: int, rows: torch.Tensor) -> None:
        matrix.add_scales(row, 0, rows)

    def check_shape(_row: int, shape: torch.Tensor) -> None:
        if shape.tolist() != [n, k]:
            raise CheckpointError(f"says {shape.tolist()}, config.json makes it {[n, k]}")

    yield Stored("weight_packed", (n, k // 8), ("I32",), words)
    yield Stored("weight_scale", (n, num_groups), SCALE_DTYPES, scales)
    if sizes.has_zeros:
        yield Stored("weight_zero_point", (n // 8, num_groups), ("I32",), zeros)
    yield Stored("weight_shape", (2,), ("I64", "I32"), check_shape, is_optional=True)


def _plain(sizes: Sizes, matrix: Matrix) -> Iterator[Stored]:
    def put(row: int, rows: torch.Tensor) -> None:
        codes, scales, zeros = w4a16.quantised(rows, sizes.group_size)
        matrix.add_words(row, 0, w4a16.words_of(codes))
        matrix.add_scales(row, 0, scales)
        matrix.add_zeros(row, 0, zeros)

    yield Stored("weight", (sizes.n, sizes.k), FLOATS, put)


def _scales_of_columns(matrix: Matrix) -> Callable[[int, torch.Tensor], None]:
    def put(group: int, rows: torch.Tensor) -> None:
        matrix.add_scales(0, group, rows.t())

    return put


_FORMATS: dict[Storage, Callable[[Sizes, Matrix], Iterator[Stored]]] = {
    "awq-gemm": _awq_gemm,
    "awq-gemv": _awq_gemv,
    "gptq": _gptq_v1,
    "gptq_v2": _gptq_v2,
    "pack-quantized": _pack_quantized,
    "plain": _plain,
}
