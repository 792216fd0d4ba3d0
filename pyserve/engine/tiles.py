"""Tiles: rows of a step whose hidden states become something, in pieces of which each has room."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pyserve.engine.state import StepState
from pyserve.model.layers.pooler import Pooler


class Tile(NamedTuple):
    """Rows that are sampled, or pooled, together.

    last_tokens, slots   of each row: the index of its last token, and its slot; -1: padding.
    results              what they are to become.
    """

    last_tokens: torch.Tensor
    slots: torch.Tensor
    hidden_rows: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    results: torch.Tensor

    def gather(self, hidden: torch.Tensor) -> None:
        """Bring the hidden states of its rows together; for padding any will do."""
        torch.clamp_min(self.last_tokens, 0, out=self.hidden_rows)
        torch.index_select(hidden, 0, self.hidden_rows, out=self.hidden)


def tiles_of(state: StepState, num_rows: int) -> list[Tile]:
    """Of so many rows."""
    tiles = []
    for start in range(0, num_rows, len(state.logits)):
        end = min(start + len(state.logits), num_rows)
        rows = state.plan.sample_rows[start:end]
        tiles.append(
            Tile(
                last_tokens=rows[:, 0],
                slots=rows[:, 1],
                hidden_rows=state.hidden_rows[: end - start],
                hidden=state.hidden[: end - start],
                logits=state.logits[: end - start],
                results=state.results[start:end],
            )
        )
    return tiles


def pool(pooler: Pooler, hidden: torch.Tensor, tiles: list[Tile]) -> None:
    """What a step without a draw does behind its forward pass."""
    for tile in tiles:
        tile.gather(hidden)
        pooler(tile.hidden, tile.results)
