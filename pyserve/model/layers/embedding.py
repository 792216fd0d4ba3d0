"""Embedding of token ids; its matrix may serve as the output head too."""

from __future__ import annotations

import torch
from torch.nn import functional

from pyserve.model.destination import Destination, Destinations


class Embedding:
    """A row of `weight` per token id. Ids out of range are refused before a step gets here."""

    __slots__ = ("weight", "_name")

    def __init__(
        self, name: str, vocab_size: int, hidden_size: int, *, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._name = name
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids int32 [num_tokens] -> [num_tokens, hidden_size], freshly allocated"""
        return functional.embedding(input_ids, self.weight)

    def destinations(self) -> Destinations:
        return {f"{self._name}.weight": Destination(self.weight)}
