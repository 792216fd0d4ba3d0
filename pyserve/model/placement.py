"""Placement: where and how parameters are made; every layer gets the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pyserve.model.registry import SchemeName

META = torch.device("meta")  # shapes without memory


class Shard(NamedTuple):
    """What one rank holds of a dimension of `whole` elements."""

    start: int
    size: int
    whole: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What a layer must know to allocate its parameters.

    dtype, device      of what is computed.
    schemes            how a module's matrix is stored, by the module's name in the checkpoint;
                       "dense" where it is not named.
    tp_rank, tp_size   this rank of those that share each layer. Only shapes can be made for more
                       than one: nothing adds up what the ranks compute yet.
    num_adapter_slots  adapters that a Linear holds beside its matrix: none yet.
    """

    dtype: torch.dtype
    device: torch.device
    schemes: Mapping[str, SchemeName] = field(default_factory=dict)
    tp_rank: int = 0
    tp_size: int = 1
    num_adapter_slots: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.tp_rank < self.tp_size
        assert self.num_adapter_slots == 0, "no Linear holds adapters yet"

    def scheme_of(self, name: str) -> SchemeName:
        return self.schemes.get(name, "dense")

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
