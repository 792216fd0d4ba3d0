"""Embedding of token ids; its matrix may serve as the output head too."""

from __future__ import annotations

import torch

from pyserve.model.destination import Destination, Destinations, Part
from pyserve.model.placement import Placement


class Embedding:
    """A row of `weight` per token id. Ids out of range are refused before a step gets here.

    Ranks share the vocabulary as a Linear's "vocabulary" rule does, so that the matrix can be tied.
    """

    __slots__ = ("weight", "_name", "_shard", "_num_stored")

    def __init__(self, name: str, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        self._name = name
        self._shard = placement.share_rounded_up(vocab_size)
        shape = self._shard.size, hidden_size
        self.weight = torch.empty(shape, dtype=placement.dtype, device=placement.device)
        self._num_stored = max(0, min(self._shard.size, vocab_size - self._shard.start))
        self.weight[self._num_stored :].zero_()

    def __call__(self, input_ids: torch.Tensor, out: torch.Tensor) -> None:
        """input_ids int32 [num_tokens] -> out [num_tokens, hidden_size]"""
        torch.index_select(self.weight, 0, input_ids, out=out)

    def destinations(self) -> Destinations:
        part = Part(self.weight[: self._num_stored], 0, self._shard.start)
        shape = self._shard.whole, self.weight.shape[1]
        return {f"{self._name}.weight": Destination(shape, (part,))}
