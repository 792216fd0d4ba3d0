"""Pooler: computes an embedding or a score from the last hidden state of a text."""

from __future__ import annotations

from dataclasses import replace

import torch

from pyserve.model.destination import Destination, Destinations, Part
from pyserve.model.placement import META, Placement
from pyserve.model.pooling import Pooling

HEAD_NAME, SCORE_NAME = "lm_head.weight", "score.weight"


class Pooler:
    """An embedding is the hidden state itself. A score is the logit of the model's one-row head, or
    the difference of two tokens' logits in the head that generates text.

    Computed in float32 whatever the model's dtype, because embeddings are cut and normalised later,
    and scores are compared with each other.

    width  size of the result for each text: hidden_size for an embedding, 1 for a score.
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
        """hidden [n, hidden_size] -> out float32 [n, width]."""
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
        """The checkpoint tensor that the score's rows come from; {} for embeddings.

        embedding  Destinations of the embedding if it is also the head that generates text (tied):
                   they are returned with the score's rows as further parts. {} if the head is a
                   matrix of its own, [vocab_size, hidden_size].
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
