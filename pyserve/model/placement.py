"""Placement: where and how parameters are made; every layer gets the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pyserve.model.quantization import Quantization
from pyserve.model.registry import SchemeName
from pyserve.ops.group import LEADER, Group

META = torch.device("meta")  # shapes without memory


class Shard(NamedTuple):
    """What one rank holds of a dimension of `whole` elements."""

    start: int
    size: int
    whole: int


class Rows(NamedTuple):
    """Outputs of a Linear that stand together, in the matrix and in the checkpoint.

    name        the checkpoint's module, whose tensors have `whole` rows.
    start, num_stored
                which of those are held here.
    size        rows of the matrix; beyond `num_stored` they are padding.
    """

    name: str
    whole: int
    start: int
    num_stored: int
    size: int


class Scratch:
    """Room for what a call of a Linear needs while it runs: one for all, as they follow each other.

    num_bytes   the most that any of them has reserved.
    """

    __slots__ = ("num_bytes", "_memory")

    def __init__(self) -> None:
        self.num_bytes = 0
        self._memory: torch.Tensor | None = None

    def reserve(self, num_bytes: int) -> None:
        """Before the first call."""
        assert self._memory is None, "too late"
        self.num_bytes = max(self.num_bytes, num_bytes)

    def of(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[num_bytes / size of an element], the same memory each time."""
        if self._memory is None:
            self._memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        return self._memory.view(dtype)


@dataclass(frozen=True, slots=True)
class Placement:
    """What a layer must know to allocate its parameters.

    dtype, device      of what is computed.
    schemes            how a module's matrix is stored, by the module's name in the checkpoint;
                       as `quantization` says where it is not named.
    quantization       of the model; None: its matrices are "dense".
    scratch            of all its Linears.
    tp_rank, tp_size   this rank of those that share each layer.
    pp_rank, pp_size   this rank of a pipeline, in which each has a run of whole layers, and the
                       first also what stands before and behind them. One of the sizes is 1.
    group              through which the ranks add up what each computes, or hand it on. None where
                       there is one rank, or where only shapes are made.
    num_adapter_slots  adapters that a Linear can hold beside its matrix, each of max_adapter_rank
                       at most; 0: none, and it has no room for any.
    """

    dtype: torch.dtype
    device: torch.device
    schemes: Mapping[str, SchemeName] = field(default_factory=dict)
    quantization: Quantization | None = None
    scratch: Scratch = field(default_factory=Scratch)
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    group: Group | None = None
    num_adapter_slots: int = 0
    max_adapter_rank: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.tp_rank < self.tp_size and 0 <= self.pp_rank < self.pp_size
        assert self.tp_size == 1 or self.pp_size == 1
        assert (self.num_adapter_slots > 0) == (self.max_adapter_rank > 0)

    @property
    def has_ends(self) -> bool:
        """Whether it has what stands before and behind the layers: embedding, head, pooler."""
        return self.pp_rank == LEADER

    @property
    def is_leading(self) -> bool:
        """Whether it samples."""
        return self.has_ends and self.tp_rank == LEADER

    def layers(self, num_layers: int) -> range:
        """Those that it has, whole or in part. Where they do not divide, the first has no more than
        any other: it has the ends."""
        bounds = [num_layers * i // self.pp_size for i in (self.pp_rank, self.pp_rank + 1)]
        return range(*bounds)

    def scheme_of(self, name: str) -> SchemeName:
        if name in self.schemes:
            return self.schemes[name]
        quantization = self.quantization
        if quantization is None or not quantization.covers(name):
            return "dense"
        return quantization.scheme

    def share(self, num_units: int, unit_size: int = 1) -> Shard:
        """This rank's part of `num_units` units, such as heads, that cannot be cut.

        Ranks get equally many. Fewer units than ranks are held by several ranks each.
        """
        whole = num_units * unit_size
        if num_units >= self.tp_size:
            assert num_units % self.tp_size == 0, f"{num_units} among {self.tp_size} ranks"
            num_here = num_units // self.tp_size
            return Shard(self.tp_rank * num_here * unit_size, num_here * unit_size, whole)
        assert self.tp_size % num_units == 0, f"{num_units} among {self.tp_size} ranks"
        return Shard(self.tp_rank * num_units // self.tp_size * unit_size, unit_size, whole)

    def share_rounded_up(self, num_units: int) -> Shard:
        """As `share`, rounded up where units do not divide: the last ranks' excess is padding."""
        num_here = -(-num_units // self.tp_size)
        return Shard(self.tp_rank * num_here, num_here, num_units)
