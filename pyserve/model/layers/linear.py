"""Linear: a matrix of the checkpoint, or several that are fused into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from pyserve.model.context import AdapterRows
from pyserve.model.destination import Destination, Destinations, row_destinations
from pyserve.model.layers.adapters import LinearAdapters
from pyserve.model.placement import Placement, Rows, Shard
from pyserve.model.schemes import (
    SCHEMES,
    ActivatingScheme,
    AdaptingScheme,
    AddingScheme,
    Dense,
    NormingScheme,
    Scheme,
    scheme_of_all,
)
from pyserve.ops import ADD, SILU_MUL, STORE

# The signature of Linear.__call__ and Linear.add: (x, out or residual, the step's adapters).
Apply = Callable[[torch.Tensor, torch.Tensor, AdapterRows | None], None]

ShardRule = Literal["whole", "column", "row", "vocabulary"]


class Output(NamedTuple):
    """`num_units` units, such as heads, of `unit_size` outputs each. Ranks divide the units.

    name   the checkpoint's module. Outputs of the same name are stored in one tensor, in order.
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
    """Outputs of these (num_units, unit_size), with one name each, or all with the only name."""
    if len(names) == 1:
        names = [*names] * len(units)
    return [Output(f"{prefix}.{name}", *sizes) for name, sizes in zip(names, units, strict=True)]


class Linear:
    """y = x W^T + b, where a Scheme stores W and multiplies by it.

    The `outputs` are concatenated in y. `shard` says what each tensor parallel rank holds:

    whole        everything.
    column       some units of each output; y is the concatenation of the ranks' y.
    vocabulary   as column, for one output that need not divide evenly: the last rank's y ends with
                 zeros.
    row          some inputs: a rank gets that part of x, and y is the sum of the ranks' y. Rank 0
                 adds the bias. The Linear does the all-reduce itself, unless it `is_partial`: then
                 the op after it must sum up.

    has_add          `add` may be called. Not if the scheme cannot, nor with shard "row" on several
                     ranks, whose sum must come before the residual is added.
    has_silu_mul     `silu_mul` may be called.
    has_norm_factor  the scheme can fuse norms into the products before and after them, for up to
                     ops.MAX_NORM_ROWS rows: add_for_norm, of_scaled and silu_mul_of_scaled may be
                     called, subject to has_add and has_silu_mul.
    adapters         LoRA adapters; None without adapter slots.

    In a step with adapters, x A^T is always computed before x W^T, so that the kernel of the latter
    can prefetch its weights meanwhile. For few rows the matrix's kernel may add the adapters' part
    itself. Otherwise it is added to a residual before the matrix's, so that the matrix's kernel
    sees the complete residual for a fused norm.
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
        self.in_features = columns.size  # on this rank, as out_features
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
        is_aligned = columns.size % 8 == 0  # the CUDA kernels for few rows require it
        is_norming = isinstance(matrix, NormingScheme) and matrix.is_norming
        self.has_norm_factor = matrix.is_fusing and is_norming and is_aligned
        self.bias: torch.Tensor | None = None
        if has_bias and (shard != "row" or placement.tp_rank == 0):
            shape = self.out_features
            self.bias = torch.zeros(shape, dtype=placement.dtype, device=placement.device)

    @classmethod
    def tied(cls, weight: torch.Tensor) -> Linear:
        """A dense Linear with a matrix, [out_features, in_features], that another layer loads."""
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
        """y = x W^T + b: x [num_tokens, in_features] -> out [num_tokens, out_features]."""
        if adapters is None or self.adapters is None:
            self.matrix(x, self.bias, out)
        elif not self._adapted(x, out, STORE, adapters):
            self.adapters.shrink(x, adapters)
            self.matrix(x, self.bias, out)
            self.adapters.expand(adapters, out)
        if self._group is not None:
            self._group.all_reduce(out)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, adapters: AdapterRows | None = None
    ) -> None:
        """residual [num_tokens, out_features] += y in place; requires has_add."""
        if not self._adapted(x, residual, ADD, adapters):
            self._add_adapters(x, residual, adapters)
            self.matrix.add(x, self.bias, residual)  # type: ignore[attr-defined]

    def silu_mul(
        self, x: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor,
        adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """silu(gate) * up -> out [num_tokens, out_features / 2], where y is gate | up.

        Requires has_silu_mul. gate_up [num_tokens, out_features] is scratch memory.
        """
        if adapters is None or self.adapters is None:
            self.matrix.silu_mul(x, self.bias, gate_up, out)  # type: ignore[attr-defined]
        elif not self._adapted(x, out, SILU_MUL, adapters):
            self.adapters.shrink(x, adapters)
            self.matrix(x, self.bias, gate_up)
            self.adapters.expand_silu_mul(adapters, gate_up, out)

    def add_for_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
        scaled: torch.Tensor, squares: torch.Tensor, adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """`add`, and then scaled = residual * norm_weight and squares = its sums of squares, which
        the Linear after a norm needs. Shapes as in ops.linear_add_for_norm; requires has_add."""
        if not self._adapted(x, residual, ADD, adapters, None, 0.0, norm_weight, scaled, squares):
            self._add_adapters(x, residual, adapters)
            matrix: NormingScheme = self.matrix  # type: ignore[assignment]
            matrix.add_for_norm(x, self.bias, residual, norm_weight, scaled, squares)

    def of_scaled(
        self, x: torch.Tensor, squares: torch.Tensor, eps: float, out: torch.Tensor,
        adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """y of the normed residual; x and squares are `scaled` and `squares` of add_for_norm."""
        matrix: NormingScheme = self.matrix  # type: ignore[assignment]
        if adapters is None or self.adapters is None:
            matrix.of_scaled(x, self.bias, out, squares, eps)
        elif not self._adapted(x, out, STORE, adapters, squares, eps):
            self.adapters.shrink(x, adapters, squares, eps)
            matrix.of_scaled(x, self.bias, out, squares, eps)
            self.adapters.expand(adapters, out)

    def silu_mul_of_scaled(
        self, x: torch.Tensor, squares: torch.Tensor, eps: float, gate_up: torch.Tensor,
        out: torch.Tensor, adapters: AdapterRows | None = None,
    ) -> None:  # fmt: skip
        """`silu_mul` of the normed residual, as of_scaled; requires has_silu_mul."""
        matrix: NormingScheme = self.matrix  # type: ignore[assignment]
        if adapters is None or self.adapters is None:
            matrix.silu_mul_of_scaled(x, self.bias, out, squares, eps)
        elif not self._adapted(x, out, SILU_MUL, adapters, squares, eps):
            self.adapters.shrink(x, adapters, squares, eps)
            matrix.of_scaled(x, self.bias, gate_up, squares, eps)
            self.adapters.expand_silu_mul(adapters, gate_up, out)

    def _adapted(
        self, x: torch.Tensor, out: torch.Tensor, epilogue: int, rows: AdapterRows | None,
        *norm: Any,
    ) -> bool:  # fmt: skip
        """Compute all of it, adapters included, if there are any and one kernel can do both.
        Returns whether it was done; `norm` is that of ops.lora.linear_lora."""
        matrix = self.matrix
        if rows is None or self.adapters is None or not isinstance(matrix, AdaptingScheme):
            return False
        return self.adapters.multiply(x, matrix.stored, self.bias, out, epilogue, rows, *norm)

    def _add_adapters(
        self, x: torch.Tensor, residual: torch.Tensor, adapters: AdapterRows | None
    ) -> None:
        if adapters is not None and self.adapters is not None:
            self.adapters.shrink(x, adapters)
            self.adapters.expand(adapters, residual)

    @property
    def num_params(self) -> int:
        """Number of elements of the matrix on this rank."""
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
    """Yield the rows that this rank holds of each output."""
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
