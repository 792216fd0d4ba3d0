"""Schemes: how the matrix of a Linear is stored and multiplied; one class for each way."""

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

    The constructor allocates it; `destinations` says what is loaded into it.

    A scheme may also be an AddingScheme, an ActivatingScheme or a NormingScheme, which fuse more
    into the product. If it is not, or not `is_fusing`, the Linear calls separate ops instead.
    """

    def __init__(self, rows: Sequence[Rows], columns: Shard, placement: Placement) -> None: ...

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads: the stored matrix with its scales."""

    @property
    def is_fusing(self) -> bool:
        """Whether the fused products that it supports are worth using on this device."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """out = x W^T + bias: x [num_tokens, columns.size] -> out [num_tokens, sum of rows]."""

    def plain(self) -> torch.Tensor:
        """The matrix [sum of rows, columns.size] in the computation's dtype; call after loading.

        Quantised schemes return a dequantised copy, Dense the matrix itself.
        """

    def destinations(self) -> Destinations:
        """Where the checkpoint's tensors of its modules go, by their names."""


@runtime_checkable
class AddingScheme(Protocol):
    """A Scheme that can fuse the addition to the residual into its product."""

    def add(self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> None:
        """residual += x W^T + bias in place; shapes as in Scheme.__call__."""


@runtime_checkable
class ActivatingScheme(Protocol):
    """A Scheme that can fuse SiLU and multiplication into the product with a gate | up matrix."""

    def silu_mul(
        self, x: torch.Tensor, bias: torch.Tensor | None, gate_up: torch.Tensor, out: torch.Tensor
    ) -> None:
        """silu(gate) * up -> out [num_tokens, sum of rows / 2], where the matrix's rows are those
        of gate, then of up. gate_up [num_tokens, sum of rows] is scratch memory."""


@runtime_checkable
class NormingScheme(AddingScheme, ActivatingScheme, Protocol):
    """A Scheme that can fuse a norm into the products before and after it, for few rows.

    The methods are as ops.linear_add_for_norm, linear_of_scaled and linear_silu_mul_of_scaled.
    """

    @property
    def is_norming(self) -> bool:
        """Whether it can with this matrix's shape."""

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


@runtime_checkable
class AdaptingScheme(Protocol):
    """A scheme that ops.lora.linear_lora may serve, the linear of few rows with adapters."""

    @property
    def stored(self) -> torch.Tensor:
        """The matrix as that op takes it."""


class Dense:
    """A plain matrix: `weight` [sum of rows, columns.size] in the computation's dtype."""

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
        """A Dense of a matrix that another layer owns and loads."""
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

    @property
    def stored(self) -> torch.Tensor:
        return self.weight

    def destinations(self) -> Destinations:
        return row_destinations("weight", self.weight, self._rows, self._columns)


SCHEMES: dict[SchemeName, type[Scheme]] = {"dense": Dense, "w4a16": W4A16, "fp8": Fp8}


def scheme_of_all(names: Iterable[str], placement: Placement) -> SchemeName:
    """The scheme of modules whose matrices are fused into one.

    Raises ConfigError if some of them are quantised and others are not.
    """
    first, *others = names
    scheme = placement.scheme_of(first)
    for name in others:
        if placement.scheme_of(name) != scheme:
            raise ConfigError(
                f"config.json: of {first} and {name}, whose matrices lie together, one is "
                "quantised and the other is not: not supported"
            )
    return scheme
