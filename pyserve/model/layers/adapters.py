"""LinearAdapters: the LoRA adapters of one Linear: their slots, and the ops that apply them.

The tensors are allocated with the model. Loading an adapter copies it into a slot, and the next one
overwrites it; nothing else is ever allocated. See ops/lora.py for the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from pyserve.model.adapter_weights import Pair, Target
from pyserve.model.context import AdapterRows
from pyserve.model.placement import Placement, Rows, Shard
from pyserve.ops.lora import (
    LinearLora,
    linear_lora,
    lora_expand,
    lora_expand_silu_mul,
    lora_shrink,
    serves_linear_lora,
)


class LinearAdapters:
    """Adapters of one Linear. Each module of the checkpoint that is fused into it is a part, which
    has a pair of matrices of its own."""

    __slots__ = (
        "num_parts", "_names", "_bounds", "_order", "_a", "_b", "_ranks", "_scales", "_columns",
        "_rows", "_inputs",
    )  # fmt: skip

    def __init__(self, rows: Sequence[Rows], inputs: Shard, placement: Placement) -> None:
        """rows, inputs: the rows and columns of the Linear's matrix that this rank holds."""
        self._rows, self._inputs = rows, inputs
        self._names = list(dict.fromkeys(part.name for part in rows))
        self.num_parts = len(self._names)
        self._order: dict[str, torch.Tensor] = {}  # module -> permutation of the rows of its B
        sizes = [sum(part.size for part in rows if part.name == name) for name in self._names]
        self._bounds = list(accumulate(sizes, initial=0))
        num_slots, max_rank = placement.num_adapter_slots, placement.max_adapter_rank

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            # Zeroing touches all pages now, so that resident memory does not grow while serving.
            return torch.empty(shape, dtype=dtype, device=placement.device).zero_()

        shape = num_slots, self.num_parts
        self._a = zeros(*shape, max_rank, inputs.size, dtype=placement.dtype)
        self._b = zeros(num_slots, self._bounds[-1], max_rank, dtype=placement.dtype)
        self._ranks = zeros(*shape, dtype=torch.int32)
        self._scales = zeros(*shape, dtype=torch.float32)
        self._columns = zeros(self.num_parts + 1, dtype=torch.int32)
        if placement.device.type != "meta":
            self._columns.copy_(torch.tensor(self._bounds, dtype=torch.int32))

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        epilogue: int, rows: AdapterRows, *norm: Any,
    ) -> bool:  # fmt: skip
        """The whole Linear with its adapters: shrink, then ops.lora.linear_lora with its arguments
        `norm`. Returns False, and does nothing, if that op does not serve these shapes."""
        adapters = LinearLora(
            rows.shrunk[self.num_parts], self._b, rows.starts, self._ranks, self._columns
        )
        if not serves_linear_lora(x, weight, out, epilogue, adapters):
            return False
        self.shrink(x, rows)
        linear_lora(x, weight, bias, out, epilogue, adapters, *norm)
        return True

    def shrink(
        self, x: torch.Tensor, rows: AdapterRows, squares: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:  # fmt: skip
        """Compute scale * x A^T for the tokens' adapters; `expand` or expand_silu_mul comes next.

        x [num_tokens, inputs.size]. The result is in rows.shrunk until the next call for any
        Linear. With `squares`, a norm is fused into the product, as in Linear.of_scaled.
        """
        lora_shrink(
            x, self._a, rows.starts, self._ranks, self._scales, rows.shrunk[self.num_parts],
            squares, eps,
        )  # fmt: skip

    def expand(self, rows: AdapterRows, out: torch.Tensor) -> None:
        """out [num_tokens, out_features] += shrunk B^T in place."""
        shrunk = rows.shrunk[self.num_parts]
        lora_expand(shrunk, self._b, rows.starts, self._ranks, self._columns, out)

    def expand_silu_mul(self, rows: AdapterRows, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """silu(gate) * up of gate_up + shrunk B^T; gate_up [num_tokens, out_features], whose
        columns are gate, then up -> out [num_tokens, out_features / 2]."""
        shrunk = rows.shrunk[self.num_parts]
        lora_expand_silu_mul(shrunk, self._b, rows.starts, self._ranks, self._columns, gate_up, out)

    def reorder(self, rows: torch.Tensor) -> None:
        """Note that the Linear's matrix was permuted after loading: its row i is the checkpoint's
        row rows[i], int64 [out_features]. The rows of each B are permuted likewise."""
        for part, name in enumerate(self._names):
            begin, end = self._bounds[part : part + 2]
            self._order[name] = rows[begin:end] - begin

    def put(self, slot: int, pairs: Mapping[str, Pair]) -> None:
        """Copy this rank's part of an adapter's pairs into `slot`; parts without one get rank 0."""
        for part, name in enumerate(self._names):
            pair = pairs.get(name)
            if pair is None:
                self._ranks[slot, part] = 0
                continue
            size = len(pair.a)
            b = torch.cat([pair.b.narrow(0, it.start, it.size) for it in self._rows_of(name)])
            if name in self._order:
                b = b[self._order[name]]
            self._a[slot, part, :size].copy_(
                pair.a.narrow(1, self._inputs.start, self._inputs.size)
            )
            self._b[slot, self._bounds[part] : self._bounds[part + 1], :size].copy_(b)
            self._ranks[slot, part] = size
            self._scales[slot, part] = pair.scale

    def targets(self) -> dict[str, Target]:
        """The shapes of the modules that an adapter may change, as on a single rank."""
        return {
            name: Target(self._rows_of(name)[0].whole, self._inputs.whole) for name in self._names
        }

    def _rows_of(self, name: str) -> list[Rows]:
        return [part for part in self._rows if part.name == name]

    @property
    def nbytes(self) -> int:
        tensors = self._a, self._b, self._ranks, self._scales, self._columns
        return sum(tensor.nbytes for tensor in tensors)
