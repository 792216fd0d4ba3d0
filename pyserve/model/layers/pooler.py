"""Pooler: what becomes of a text's last hidden state where no token is sampled from it."""

from __future__ import annotations

from dataclasses import replace

import torch

from pyserve.model.destination import Destination, Destinations, Part
from pyserve.model.placement import META, Placement
from pyserve.model.pooling import Pooling

HEAD_NAME, SCORE_NAME = "lm_head.weight", "score.weight"


class Pooler:
    """An embedding is the hidden state itself. A score is its product with the one row of the
    model's own head, or with the rows of two tokens in the head that generates: the difference.

    Computed in float32, whatever the model's dtype: what is cut and normalised later, or compared
    with other scores, should lose nothing here.

    width  numbers that a text becomes.
    """

    __slots__ = ("width", "_pooling", "_weight", "_softcap")

    def __init__(
        self, pooling: Pooling, hidden_size: int, placement: Placement, *, logit_softcap: float
    ) -> None:
        is_known = bool(pooling.answer_ids) or not pooling.answers
        assert is_known or placement.device == META, "the tokens' ids come from the tokenizer"
        self._pooling = pooling
        self._softcap = logit_softcap if pooling.has_text_head else 0.0
        self.width = hidden_size if pooling.kind == "embed" else 1
        num_rows = 0
        if pooling.kind == "score":
            num_rows = len(pooling.answer_ids or pooling.answers) or 1
        shape = num_rows, hidden_size
        self._weight = torch.empty(shape, dtype=torch.float32, device=placement.device)

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """hidden [n, hidden_size] -> out float32 [n, width]"""
        if self._pooling.kind == "embed":
            out.copy_(hidden)
            return
        logits = hidden.float() @ self._weight.T
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        out.copy_(logits[:, -1:])
        if logits.shape[1] > 1:
            out -= logits[:, :1]

    def destinations(self, embedding: Destinations, *, vocab_size: int) -> Destinations:
        """What of the checkpoint goes here.

        embedding  the one that is the head that generates, too; {}: the head is a matrix of its own
                   [vocab_size, hidden_size]. What goes to it is among what is returned.
        """
        if self._pooling.kind == "embed":
            return {}
        if self._pooling.has_own_head:
            return {SCORE_NAME: Destination.whole(self._weight)}
        ids = self._pooling.answer_ids or (0,) * len(self._weight)
        parts = tuple(
            Part(self._weight[row : row + 1], 0, token_id) for row, token_id in enumerate(ids)
        )
        for name, head in embedding.items():
            return {name: replace(head, parts=(*head.parts, *parts))}
        return {HEAD_NAME: Destination((vocab_size, self._weight.shape[1]), parts)}
