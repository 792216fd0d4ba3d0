"""Tiles: the sampled or pooled rows of a step, divided into pieces that fit the logits buffer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pyserve.engine.state import StepState
from pyserve.model.decoder import Decoder
from pyserve.ops import step_layout as layout


class Tile(NamedTuple):
    """Rows that are sampled, or pooled, together. All tensors are views of a StepState.

    last_tokens  int32 [num_rows]: index of each row's last token in the step; -1: padding.
    slots        int32 [num_rows]: each row's slot; -1: padding.
    hidden_rows  int32 [num_rows]: scratch for `gather`.
    hidden       [num_rows, hidden_size]: hidden states of the rows' last tokens.
    logits       [num_rows, vocab_size].
    results      int32 [num_rows] sampled tokens, or float32 [num_rows, width] pooled vectors.
    """

    last_tokens: torch.Tensor
    slots: torch.Tensor
    hidden_rows: torch.Tensor
    hidden: torch.Tensor
    logits: torch.Tensor
    results: torch.Tensor

    def gather(self, hidden: torch.Tensor) -> None:
        """Copy the hidden states of the rows' last tokens from `hidden`, [num_tokens, hidden_size].

        Padding rows get those of token 0, which are not used.
        """
        torch.clamp_min(self.last_tokens, 0, out=self.hidden_rows)
        torch.index_select(hidden, 0, self.hidden_rows, out=self.hidden)


def tiles_of(state: StepState, num_rows: int) -> list[Tile]:
    """The tiles of the first num_rows sampled rows of a step."""
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
    """Pool the rows of `tiles` into their results. Models that pool do this instead of sampling."""
    assert model.pooler is not None
    for tile in tiles:
        tile.gather(hidden)
        model.to_leader(tile.hidden)
        if model.placement.has_ends:
            model.pooler(tile.hidden, tile.results)


def share_tokens(model: Decoder, state: StepState, tiles: list[Tile]) -> None:
    """Broadcast the tokens that the leader has sampled, and store them in the followers' slots.

    On the leader `ops.sample` has stored them already. In a pipeline only the leader embeds tokens,
    so nothing is sent and the followers store zeros.
    """
    placement = model.placement
    if placement.tp_size > 1:
        assert placement.group is not None
        placement.group.broadcast(state.results)
    if placement.is_leading:
        return
    last_tokens = state.slots[:, layout.SLOT_LAST_TOKEN]
    for tile in tiles:
        # One more entry at the end takes the writes of padding rows.
        tokens = torch.cat((last_tokens, last_tokens[:1]))
        places = torch.where(tile.slots < 0, len(last_tokens), tile.slots)
        tokens.scatter_(0, places.long(), tile.results.clamp_min(0))
        last_tokens.copy_(tokens[:-1])
