"""Embedding of token ids. Its matrix may be the output head too (tied)."""

from __future__ import annotations

import torch

from pyserve.model.destination import Destination, Destinations, Part
from pyserve.model.placement import Placement


class Embedding:
    """One row of `weight` for each token id, multiplied by `scale`. As in transformers, the scale
    is rounded to the weight's dtype. Token ids are checked before a step gets here.

    Tensor parallel ranks divide the vocabulary like a Linear with shard "vocabulary", so that the
    matrix can be tied: each rank looks up the rows that it holds, and an all-reduce adds them up.
    In a pipeline rank 0 has the whole matrix.
    """

    __slots__ = ("weight", "_name", "_shard", "_num_stored", "_scale", "_group")

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, placement: Placement, *,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        self._name = name
        self._shard = placement.share_rounded_up(vocab_size if placement.has_ends else 0)
        shape = self._shard.size, hidden_size
        self.weight = torch.empty(shape, dtype=placement.dtype, device=placement.device)
        self._num_stored = max(0, min(self._shard.size, self._shard.whole - self._shard.start))
        self.weight[self._num_stored :].zero_()
        self._group = placement.group if placement.tp_size > 1 else None
        self._scale = torch.tensor(scale, dtype=placement.dtype).item()

    def __call__(self, input_ids: torch.Tensor, out: torch.Tensor) -> None:
        """input_ids int32 [num_tokens] -> out [num_tokens, hidden_size]."""
        if self._group is None:
            torch.index_select(self.weight, 0, input_ids, out=out)
        else:
            rows = input_ids - self._shard.start
            is_elsewhere = (rows < 0) | (rows >= self._num_stored)
            torch.index_select(self.weight, 0, rows.clamp_(0, self._shard.size - 1), out=out)
            self._group.all_reduce(out.masked_fill_(is_elsewhere[:, None], 0))
        if self._scale != 1.0:
            out.mul_(self._scale)

    def destinations(self) -> Destinations:
        if not self._shard.whole:
            return {}
        part = Part(self.weight[: self._num_stored], 0, self._shard.start)
        shape = self._shard.whole, self.weight.shape[1]
        return {f"{self._name}.weight": Destination(shape, (part,))}
