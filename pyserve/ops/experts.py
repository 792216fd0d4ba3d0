"""Typed wrappers of the ops of a mixture of experts, as those in __init__.py.

A token goes to top_k of num_experts experts. Its assignments stand in the order of the experts,
those of one expert in the order of the tokens; `rows` below are in that order. Padded tokens, whose
KV slot is -1, go to none, so there may be fewer than num_tokens * top_k of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops.native import native

CHUNK_ROWS = 256  # of an expert, multiplied at once where torch does it: bounds what it needs


@dataclass(frozen=True, slots=True)
class Rule:
    """How a router's logits become choices and weights.

    is_sigmoid     scores are sigmoid(logit), each for itself; else the softmax over all experts.
    is_normalized  a token's weights are its scores divided by their sum (of sigmoids plus 1e-20).
                   With a softmax, that is the softmax over the chosen logits alone.
    scale          the weights are multiplied by it.
    num_groups     of as many neighbouring experts each, of which only the best `top_groups` are
                   chosen from: a group is as good as its best expert, or with sigmoids as its two
                   best together (DeepSeek-V2 and V3, 2024).
    """

    is_sigmoid: bool = False
    is_normalized: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


class Routing(NamedTuple):
    """Which experts tokens go to; `route` fills it."""

    logits: Tensor  # float32 [num_tokens, rows of the router]
    weights: Tensor  # float32 [num_tokens, top_k], then one column for the shared expert's gate
    places: Tensor  # int32 [num_tokens, top_k]: row of each assignment, -1 of padding
    order: Tensor  # int32 [num_tokens * top_k]: token * top_k + j of each row, -1 behind the last
    offsets: Tensor  # int32 [num_experts + 1]: where the rows of each expert begin


def route(
    x: Tensor, router: Tensor, correction_bias: Tensor | None, slot_mapping: Tensor, rule: Rule,
    routing: Routing,
) -> None:  # fmt: skip
    """Choose each token's experts, of equal ones the lower, and sort the tokens by them.

    x [num_tokens, hidden]; router [num_experts, hidden], and one more row where a gate scales what
    a shared expert makes: its sigmoid is the last of the weights. correction_bias float32
    [num_experts] is added to the scores for the choice alone. slot_mapping int64 [num_tokens], -1
    of padding. Scores are float32.
    """
    native.route(
        x, router, correction_bias, slot_mapping, rule.is_sigmoid, rule.is_normalized, rule.scale,
        rule.num_groups, rule.top_groups, *routing,
    )  # fmt: skip


def grouped_linear_silu_mul(
    x: Tensor, weight: Tensor, routing: Routing, out: Tensor, sorted_x: Tensor
) -> None:
    """silu(gate) * up of gate | up = x weight[e]^T for each expert e of a token, rounded once.

    x [num_tokens, hidden], weight [num_experts, 2 n, hidden] -> out [rows, n]; sorted_x
    [rows, hidden] is room for x in the order of the rows, where it takes that.
    """
    if not _is_torch_faster(x, weight, routing, ops.SILU_MUL):
        native.grouped_linear_silu_mul(x, weight, routing.order, routing.offsets, sorted_x, out)
        return
    sort_rows(x, routing, sorted_x)
    gate_up = x.new_empty(CHUNK_ROWS, weight.shape[1])
    for expert, begin, end in chunks(routing):
        ops.linear_silu_mul(
            sorted_x[begin:end], weight[expert], None, out[begin:end], gate_up[: end - begin]
        )


def grouped_linear(x: Tensor, weight: Tensor, routing: Routing, out: Tensor) -> None:
    """x weight[e]^T for each row's expert e.

    x [rows, k], weight [num_experts, n, k] -> out [rows, n]
    """
    if not _is_torch_faster(x, weight, routing, ops.STORE):
        num_tokens = routing.places.shape[0]  # no expert has more rows
        native.grouped_linear(x, weight, routing.offsets, num_tokens, out)
        return
    for expert, begin, end in chunks(routing):
        ops.linear(x[begin:end], weight[expert], None, out[begin:end])


def combine_experts(
    rows: Tensor, routing: Routing, shared: Tensor | None, out: Tensor, *, is_adding: bool
) -> None:
    """The sum of what a token's experts made, each times its weight -> out [num_tokens, n].

    rows [num_tokens * top_k, n]; shared [num_tokens, n], what experts made that take every token,
    times the last weight where there is one. Added in the order of a token's experts, then shared,
    then, where `is_adding`, to what out holds; rounded once.
    """
    native.combine_experts(rows, routing.places, routing.weights, shared, is_adding, out)


def _is_torch_faster(x: Tensor, weight: Tensor, routing: Routing, epilogue: int) -> bool:
    """Whether, on a CPU, an expert has more rows than the native op is made for."""
    if x.is_cuda:
        return False
    return not native.serves_linear(weight[0], longest_group(routing), epilogue)


def longest_group(routing: Routing) -> int:
    """The most rows that an expert has; on a card it would wait."""
    return int(routing.offsets.diff().max())


def sort_rows(x: Tensor, routing: Routing, sorted_x: Tensor) -> None:
    """x [num_tokens, hidden] in the order of the rows -> sorted_x, as many as there are."""
    count, top_k = int(routing.offsets[-1]), routing.places.shape[1]
    torch.index_select(x, 0, routing.order[:count] // top_k, out=sorted_x[:count])


def chunks(routing: Routing) -> list[tuple[int, int, int]]:
    """(expert, begin, end) of rows, at most CHUNK_ROWS."""
    offsets = routing.offsets.tolist()
    return [
        (expert, begin, min(begin + CHUNK_ROWS, end))
        for expert, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True))
        for begin in range(start, end, CHUNK_ROWS)
    ]
