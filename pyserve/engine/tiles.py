"""Tiles: rows of a step whose hidden states become something, in pieces of which each has room."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pyserve.engine.state import StepState
from pyserve.model.decoder import Decoder
from pyserve.ops import step_layout as layout


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


def pool(model: Decoder, hidden: torch.Tensor, tiles: list[Tile]) -> None:
    """What a step without a draw does behind its forward pass."""
    assert model.pooler is not None
    for tile in tiles:
        tile.gather(hidden)
        model.to_leader(tile.hidden)
        if model.placement.has_ends:
            model.pooler(tile.hidden, tile.results)


def share_tokens(model: Decoder, state: StepState, tiles: list[Tile]) -> None:
    """Let all ranks have what the leader has sampled, and the others note it as `sample` does. In a
    pipeline the leader alone embeds tokens: there the others note zeros, which need not travel."""
    placement = model.placement
    if placement.tp_size > 1:
        assert placement.group is not None
        placement.group.broadcast(state.results)
    if placement.is_leading:
        return
    last_tokens = state.slots[:, layout.SLOT_LAST_TOKEN]
    for tile in tiles:
        # One place more, for the rows that are padding.
        tokens = torch.cat((last_tokens, last_tokens[:1]))
        places = torch.where(tile.slots < 0, len(last_tokens), tile.slots)
        tokens.scatter_(0, places.long(), tile.results.clamp_min(0))
        last_tokens.copy_(tokens[:-1])
