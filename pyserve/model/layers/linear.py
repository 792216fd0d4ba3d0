"""Linear: a matrix of the model, or several of the checkpoint fused into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from pyserve.model.context import AdapterRows
from pyserve.model.destination import Destination, Destinations, row_destinations
from pyserve.model.layers.adapters import LinearAdapters
from pyserve.model.placement import Placement, Rows, Shard
from pyserve.model.schemes import (
    SCHEMES,
    ActivatingScheme,
    AddingScheme,
    Dense,
    NormingScheme,
    Scheme,
    scheme_of_all,
)

# Of a Linear to x, into what follows, with the adapters of the step's tokens or none.
Apply = Callable[[torch.Tensor, torch.Tensor, AdapterRows | None], None]

ShardRule = Literal["whole", "column", "row", "vocabulary"]


class Output(NamedTuple):
    """`num_units` times `unit_size` outputs of a Linear; ranks share units, such as heads.

    name   the checkpoint's module. Outputs of one name are one tensor there, in the same order.
    """

    name: str
    num_units: int
    unit_size: int = 1

    @property
    def size(self) -> int:
        return self.num_units * self.unit_size


def fused_outputs(
    prefix: str, names: Sequence[str], units: Sequence[tuple[int, int]]
) -> list[Output]:
    """Outputs of (num_units, unit_size) each, under a name each or all under the only one."""
    if len(names) == 1:
        names = [*names] * len(units)
    return [Output(f"{prefix}.{name}", *sizes) for name, sizes in zip(names, units, strict=True)]


class Linear:
    """y = x W^T + b: the shape, and the Scheme that stores W and multiplies by it.

    `outputs` stand one after the other in y. `shard` says what a rank holds:

    whole        everything.
    column       some units of each output: the ranks' y, put together, are y.
    vocabulary   as column, for one output that need not divide: the excess at the end of the last
                 rank's y is 0.
    row          some inputs: a rank gets that part of x, and the ranks' sums add up to y. The bias
                 is with rank 0. The ranks add them up, unless the Linear `is_partial`: then what
                 comes next has to.

    `add` and `silu_mul` are there where a step between would find no place: not where the scheme
    cannot, nor where the other ranks' part is still to come. Where `has_norm_factor`, so are those
    that leave a norm to be a factor, for ops.MAX_NORM_ROWS. In a step with tokens that use an
    adapter its part of y is added to what is there already before the matrix's where that is added
    too, so that what follows is left to the matrix; the first half of it is worked out before the
    matrix's in any case, which asks for its weights meanwhile.

    adapters  None where the placement has no slots for any.
    """

    __slots__ = (
        "matrix", "bias", "in_features", "out_features", "has_add", "has_silu_mul",
        "has_norm_factor", "is_partial", "adapters", "_rows", "_has_bias", "_group",
    )  # fmt: skip

    def __init__(
        self,
        outputs: Sequence[Output],
        in_features: int,
        placement: Placement,
        *,
        has_bias: bool = False,
        shard: ShardRule = "whole",
        is_summed_later: bool = False,
    ) -> None:
        columns = Shard(0, in_features, in_features)
        if shard == "row":
            columns = placement.share(in_features)
        self._rows = tuple(shard_rows(outputs, placement, shard))
        self._has_bias = has_bias
        scheme = scheme_of_all((output.name for output in outputs), placement)
        self.matrix: Scheme = SCHEMES[scheme](self._rows, columns, placement)
        self.in_features = columns.size  # here, of this rank, as the next
        self.out_features = sum(part.size for part in self._rows)
        self.adapters: LinearAdapters | None = None
        if placement.num_adapter_slots:
            self.adapters = LinearAdapters(self._rows, columns, placement)
        matrix = self.matrix
        has_parts = shard == "row" and placement.tp_size > 1
        self.is_partial = has_parts and is_summed_later
        self._group = placement.group if has_parts and not is_summed_later else None
        is_adding = matrix.is_fusing and isinstance(matrix, AddingScheme)
        self.has_add = is_adding and not has_parts
        self.has_silu_mul = matrix.is_fusing and isinstance(matrix, ActivatingScheme)
        is_aligned = columns.size % 8 == 0  # as the card's kernels for few rows ask
        is_norming = isinstance(matrix, NormingScheme) and matrix.is_norming
        self.has_norm_factor = matrix.is_fusing and is_norming and is_aligned
        self.bias: torch.Tensor | None = None
        if has_bias and (shard != "row" or placement.tp_rank == 0):
            shape = self.out_features
            self.bias = torch.zeros(shape, dtype=placement.dtype, device=placement.device)

    @classmethod
    def tied(cls, weight: torch.Tensor) -> Linear:
        """The dense Linear of a matrix that another layer owns and loads."""
        linear = cls.__new__(cls)
        linear.matrix, linear.bias = Dense.over(weight), None
        linear.out_features, linear.in_features = weight.shape
        linear._rows, linear._has_bias, linear.adapters = (), False, None
        linear.has_add = linear.has_silu_mul = linear.has_norm_factor = False
        linear.is_partial, linear._group = False, None
        return linear

    def __call__(
        self, x: torch.Tensor, out: torch.Tensor, adapters: AdapterRows | None = None
    ) -> None:
        """x [num_tokens, inputs here] -> out [num_tokens, out_features]"""
        if adapters is None or self.adapters is None:
            self.matrix(x, self.bias, out)
        else:
            self.adapters.shrink(x, adapters)
            self.matrix(x, self.bias, out)
            self.adapters.expand(adapters, out)
        if self._group is not None:
            self._group.all_reduce(out)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, adapters: AdapterRows | None = None
    ) -> None:
        """residual [num_tokens, out_features] += y in place; where `has_add`."""
        self._add_adapters(x, residual, adapters)
        self.matrix.add(x, self.bias, residual)  # type: ignore[attr-defined]

    def silu_mul(
        self, x: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor,
        adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """silu(gate) * up -> out [num_tokens, out_features / 2], where y is gate, then up.

        Where `has_silu_mul`; gate_up has room for y.
        """
        if adapters is None or self.adapters is None:
            self.matrix.silu_mul(x, self.bias, gate_up, out)  # type: ignore[attr-defined]
        else:
            self.adapters.shrink(x, adapters)
            self.matrix(x, self.bias, gate_up)
            self.adapters.expand_silu_mul(adapters, gate_up, out)

    def add_for_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
        scaled: torch.Tensor, squares: torch.Tensor, adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """`add`, and what a norm of the residual needs -> scaled, squares; where `has_add` too."""
        self._add_adapters(x, residual, adapters)
        matrix: NormingScheme = self.matrix  # type: ignore[assignment]
        matrix.add_for_norm(x, self.bias, residual, norm_weight, scaled, squares)

    def of_scaled(
        self, x: torch.Tensor, squares: torch.Tensor, eps: float, out: torch.Tensor,
        adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """y of what the norm would make, given `scaled` as x and `squares`."""
        matrix: NormingScheme = self.matrix  # type: ignore[assignment]
        if adapters is None or self.adapters is None:
            matrix.of_scaled(x, self.bias, out, squares, eps)
        else:
            self.adapters.shrink(x, adapters, squares, eps)
            matrix.of_scaled(x, self.bias, out, squares, eps)
            self.adapters.expand(adapters, out)

    def silu_mul_of_scaled(
        self, x: torch.Tensor, squares: torch.Tensor, eps: float, gate_up: torch.Tensor,
        out: torch.Tensor, adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """`silu_mul` of what the norm would make; where `has_silu_mul` too."""
        matrix: NormingScheme = self.matrix  # type: ignore[assignment]
        if adapters is None or self.adapters is None:
            matrix.silu_mul_of_scaled(x, self.bias, out, squares, eps)
        else:
            self.adapters.shrink(x, adapters, squares, eps)
            matrix.of_scaled(x, self.bias, gate_up, squares, eps)
            self.adapters.expand_silu_mul(adapters, gate_up, out)

    def _add_adapters(
        self, x: torch.Tensor, residual: torch.Tensor, adapters: AdapterRows | None
    ) -> None:
        if adapters is not None and self.adapters is not None:
            self.adapters.shrink(x, adapters)
            self.adapters.expand(adapters, residual)

    @property
    def num_params(self) -> int:
        """Of the matrix, here."""
        return self.out_features * self.in_features

    def destinations(self) -> Destinations:
        destinations = self.matrix.destinations()
        if self.bias is not None:
            destinations |= row_destinations("bias", self.bias, self._rows)
        elif self._has_bias:
            destinations |= {
                f"{part.name}.bias": Destination((part.whole,), ()) for part in self._rows
            }
        return destinations


def shard_rows(outputs: Sequence[Output], placement: Placement, shard: ShardRule) -> Iterator[Rows]:
    """What a rank holds of each output."""
    for index, output in enumerate(outputs):
        held = Shard(0, output.size, output.size)
        if shard == "column":
            held = placement.share(output.num_units, output.unit_size)
        elif shard == "vocabulary":
            held = placement.share_rounded_up(output.size)
        same_name = [other.size for other in outputs if other.name == output.name]
        before = sum(other.size for other in outputs[:index] if other.name == output.name)
        num_stored = max(0, min(held.size, output.size - held.start))
        yield Rows(output.name, sum(same_name), before + held.start, num_stored, held.size)
