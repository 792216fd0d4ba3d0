"""Float64 meaning of `sample`, written apart from the twin: one row, from its parameters alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from pyserve.ops.philox import philox4x32
from tests.ops.step_inputs import SlotUpdate

Doubles = NDArray[np.float64]

# Weights of the ops are rounded to float32 and to multiples of 2^-34 of the largest: what lies
# closer to a limit than this may fall on either side of it.
TOLERANCE = 1e-5


def adjusted_logits(logits: Doubles, row: SlotUpdate) -> Doubles:
    """Logits [vocab] after bias, ban of stop ids and penalties."""
    adjusted = logits.copy()
    for token_id, bias in row.bias.items():
        adjusted[token_id] += np.float32(bias)
    if row.num_computed < row.min_total_len:
        adjusted[row.stop_ids] = -np.inf
    if row.has_penalties:
        repetition = float(np.float32(row.repetition_penalty))
        for token_id in set(row.prompt) | set(row.output):
            if adjusted[token_id] > 0:
                adjusted[token_id] /= repetition
            else:
                adjusted[token_id] *= repetition
        for token_id, count in Counter(row.output).items():
            adjusted[token_id] -= row.frequency_penalty * count + row.presence_penalty
    return adjusted


def uniform(position: int, sample_index: int, seed: int) -> float:
    """The random number in [0, 1) of one draw."""
    words = philox4x32((position, sample_index, 0, 0), (seed, seed >> 32))
    return (words[1] << 32 | words[0]) / 2.0**64


def possible_tokens(logits: Doubles, row: SlotUpdate) -> set[int]:
    """Token ids that the row may draw: one, or several where a limit is closer than TOLERANCE;
    -1 where none is left."""
    adjusted = adjusted_logits(logits, row)
    if adjusted.max() == -np.inf:
        return {-1}
    if row.temperature < 1e-5:
        return {int(np.argmax(adjusted))}
    drawn = set()
    for sign in (-1, 0, 1):
        weights = np.exp((adjusted - adjusted.max()) / row.temperature)
        by_logit = np.argsort(-adjusted, kind="stable")
        kept = by_logit[: row.top_k] if row.top_k else by_logit
        kept = kept[weights[kept] >= min(row.min_p * (1 + sign * TOLERANCE), 1.0)]
        if row.top_p < 1:
            before = np.cumsum(weights[kept]) - weights[kept]
            limit = row.top_p * (1 + sign * TOLERANCE) * weights[kept].sum()
            kept = kept[before < limit]
        kept = np.sort(kept)
        cumulative = np.cumsum(weights[kept])
        for shift in (-TOLERANCE, 0.0, TOLERANCE):
            at = uniform(row.num_computed, row.sample_index, row.seed) + shift
            index = np.searchsorted(cumulative, at * cumulative[-1], side="right")
            drawn.add(int(kept[min(max(index, 0), len(kept) - 1)]))
    return drawn
