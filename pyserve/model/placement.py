"""Placement: how layers allocate their parameters: dtype, device, scheme, shard and adapter slots.
All layers get the same one."""

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
    """The range [start, start + size) that one rank holds of a dimension of `whole` elements."""

    start: int
    size: int
    whole: int


class Rows(NamedTuple):
    """Consecutive rows of a Linear's matrix that come from consecutive rows of one module.

    name        the module's name in the checkpoint.
    whole       number of rows of the module's tensors.
    start, num_stored
                the range of these rows that this rank holds.
    size        rows that they take in the matrix; those beyond `num_stored` are padding.
    """

    name: str
    whole: int
    start: int
    num_stored: int
    size: int


class Scratch:
    """Temporary memory for the calls of Linears. All share it, as they run one after the other.

    num_bytes   the most that any Linear has reserved.
    """

    __slots__ = ("num_bytes", "_memory")

    def __init__(self) -> None:
        self.num_bytes = 0
        self._memory: torch.Tensor | None = None

    def reserve(self, num_bytes: int) -> None:
        """Ensure room for num_bytes bytes; called before the first use of the memory."""
        assert self._memory is None, "too late"
        self.num_bytes = max(self.num_bytes, num_bytes)

    def of(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The memory as [num_bytes / element size] of `dtype`; the same memory at each call."""
        if self._memory is None:
            self._memory = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        return self._memory.view(dtype)


@dataclass(frozen=True, slots=True)
class Placement:
    """What a layer must know to allocate its parameters.

    dtype, device      dtype of the computation, and device of the parameters.
    schemes            module name in the checkpoint -> scheme; other modules are as `quantization`
                       says.
    quantization       of the model; None: its matrices are "dense".
    scratch            temporary memory that all Linears share.
    tp_rank, tp_size   tensor parallel: this rank, and how many ranks share each layer.
    pp_rank, pp_size   pipeline parallel: this rank, and how many ranks have a run of whole layers
                       each. Rank 0 also has embedding, head and pooler. tp_size or pp_size is 1.
    group              process group of the ranks; None with one rank, or if only shapes are made.
    num_adapter_slots  number of adapters that a Linear has room for; 0: adapters are off.
    max_adapter_rank   the highest rank of an adapter; 0 if adapters are off.
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
        """Whether this rank has the embedding, head and pooler."""
        return self.pp_rank == LEADER

    @property
    def is_leading(self) -> bool:
        """Whether this rank is the leader, which samples."""
        return self.has_ends and self.tp_rank == LEADER

    def layers(self, num_layers: int) -> range:
        """The indices of the layers that this rank holds, whole or in part.

        If they do not divide evenly, rank 0 has no more than any other, as it has the embedding and
        head too.
        """
        bounds = [num_layers * i // self.pp_size for i in (self.pp_rank, self.pp_rank + 1)]
        return range(*bounds)

    def scheme_of(self, name: str) -> SchemeName:
        """The scheme of the checkpoint's module `name`."""
        if name in self.schemes:
            return self.schemes[name]
        quantization = self.quantization
        if quantization is None or not quantization.covers(name):
            return "dense"
        return quantization.scheme

    def share(self, num_units: int, unit_size: int = 1) -> Shard:
        """This rank's part of num_units units of unit_size elements, such as heads.

        All ranks get equally many units. With fewer units than ranks, several ranks hold the same
        unit.
        """
        whole = num_units * unit_size
        if num_units >= self.tp_size:
            assert num_units % self.tp_size == 0, f"{num_units} among {self.tp_size} ranks"
            num_here = num_units // self.tp_size
            return Shard(self.tp_rank * num_here * unit_size, num_here * unit_size, whole)
        assert self.tp_size % num_units == 0, f"{num_units} among {self.tp_size} ranks"
        return Shard(self.tp_rank * num_units // self.tp_size * unit_size, unit_size, whole)

    def share_rounded_up(self, num_units: int) -> Shard:
        """As `share`, but rounded up if units do not divide evenly: the last ranks have padding."""
        num_here = -(-num_units // self.tp_size)
        return Shard(self.tp_rank * num_here, num_here, num_units)
