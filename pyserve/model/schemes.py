"""How the matrix of a Linear is stored and multiplied: one class a scheme."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch

from pyserve import ops
from pyserve.errors import ConfigError
from pyserve.model.destination import Destinations, row_destinations
from pyserve.model.fp8 import Fp8
from pyserve.model.placement import Placement, Rows, Shard
from pyserve.model.registry import SchemeName
from pyserve.model.w4a16 import W4A16


class Scheme(Protocol):
    """The matrix [sum of rows, columns.size] of a Linear.

    Its constructor allocates. What is loaded is what `destinations` says: names, stored shapes and
    dtypes, slices.

    A scheme may be an AddingScheme or an ActivatingScheme too: where it is not, or not `is_fusing`,
    what is plain stands in.
    """

    def __init__(self, rows: Sequence[Rows], columns: Shard, placement: Placement) -> None: ...

    @property
    def nbytes(self) -> int:
        """Of what is read where it multiplies."""

    @property
    def is_fusing(self) -> bool:
        """Whether what it can do beside its products is faster there."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """x [num_tokens, columns.size] -> out [num_tokens, sum of rows]"""

    def plain(self) -> torch.Tensor:
        """The matrix as plain numbers [sum of rows, columns.size], in the dtype of what is
        computed; after loading. Of some schemes a copy."""

    def destinations(self) -> Destinations: ...


@runtime_checkable
class AddingScheme(Protocol):
    """One that can add to the residual where it multiplies."""

    def add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        """residual += x W^T + bias in place; shapes as those of a Scheme's call"""


@runtime_checkable
class ActivatingScheme(Protocol):
    """One that can activate what it multiplies, of a matrix whose rows are gate, then up."""

    def silu_mul(
        self, x: torch.Tensor, bias: torch.Tensor | None, gate_up: torch.Tensor, out: torch.Tensor
    ) -> None:
        """silu(gate) * up -> out [num_tokens, sum of rows / 2]; gate_up, with room for both, may be
        written too"""


@runtime_checkable
class NormingScheme(AddingScheme, ActivatingScheme, Protocol):
    """One between two of which a norm can be a factor, for few rows: ops.linear_add_for_norm."""

    @property
    def is_norming(self) -> bool:
        """Whether it can with its rows."""

    def add_for_norm(
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor,
        norm_weight: torch.Tensor, scaled: torch.Tensor, squares: torch.Tensor,
    ) -> None: ...  # fmt: skip

    def of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None: ...  # fmt: skip

    def silu_mul_of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None: ...  # fmt: skip


class Dense:
    """`weight` holds plain numbers, in the dtype of the computation."""

    __slots__ = ("weight", "_rows", "_columns")

    def __init__(self, rows: Sequence[Rows], columns: Shard, placement: Placement) -> None:
        self._rows = rows
        self._columns = columns
        shape = sum(part.size for part in rows), columns.size
        self.weight = torch.empty(shape, dtype=placement.dtype, device=placement.device)
        if any(part.num_stored < part.size for part in rows):
            self.weight.zero_()  # padding

    @classmethod
    def over(cls, weight: torch.Tensor) -> Dense:
        """Of a matrix that is loaded elsewhere."""
        dense = cls.__new__(cls)
        dense.weight, dense._rows, dense._columns = weight, (), Shard(0, 0, 0)
        return dense

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def is_fusing(self) -> bool:
        return True

    @property
    def is_norming(self) -> bool:
        return True

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        ops.linear(x, self.weight, bias, out)

    def add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        ops.linear_add(x, self.weight, bias, residual)

    def silu_mul(
        self, x: torch.Tensor, bias: torch.Tensor | None, gate_up: torch.Tensor, out: torch.Tensor
    ) -> None:
        ops.linear_silu_mul(x, self.weight, bias, out, gate_up)

    def add_for_norm(
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor,
        norm_weight: torch.Tensor, scaled: torch.Tensor, squares: torch.Tensor,
    ) -> None:  # fmt: skip
        ops.linear_add_for_norm(x, self.weight, bias, residual, norm_weight, scaled, squares)

    def of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None:  # fmt: skip
        ops.linear_of_scaled(x, self.weight, bias, out, squares, eps)

    def silu_mul_of_scaled(
        self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        squares: torch.Tensor, eps: float,
    ) -> None:  # fmt: skip
        ops.linear_silu_mul_of_scaled(x, self.weight, bias, out, squares, eps)

    def plain(self) -> torch.Tensor:
        return self.weight

    def destinations(self) -> Destinations:
        return row_destinations("weight", self.weight, self._rows, self._columns)


SCHEMES: dict[SchemeName, type[Scheme]] = {"dense": Dense, "w4a16": W4A16, "fp8": Fp8}


def scheme_of_all(names: Iterable[str], placement: Placement) -> SchemeName:
    """How modules whose matrices lie together are stored: alike. Raises ConfigError where they are
    not."""
    first, *others = names
    scheme = placement.scheme_of(first)
    for name in others:
        if placement.scheme_of(name) != scheme:
            raise ConfigError(
                f"config.json: of {first} and {name}, whose matrices lie together, one is "
                "quantised and the other is not: not supported"
            )
    return scheme
