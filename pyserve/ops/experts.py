"""Typed wrappers of the ops of a mixture of experts, like those in __init__.py.

Each token goes to top_k of num_experts experts. A row below is one assignment of a token to an
expert; rows are sorted by expert, then by token. Padding tokens, whose KV slot is -1, go to no
expert, so there may be fewer than num_tokens * top_k rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops.native import native

CHUNK_ROWS = 256  # rows of an expert that torch multiplies at once; bounds the scratch memory


@dataclass(frozen=True, slots=True)
class Rule:
    """How a router's logits become choices and weights.

    is_sigmoid     scores are sigmoid(logit); otherwise the softmax over all experts.
    is_normalized  the weights of a token are the chosen scores divided by their sum (with sigmoids,
                   their sum + 1e-20). With softmax that equals the softmax of the chosen logits.
    scale          factor of the weights.
    num_groups     the experts are divided into so many groups of neighbours of equal size, and only
                   those in the best `top_groups` groups may be chosen. A group's score is that of
                   its best expert, or with sigmoids the sum of its two best ones (DeepSeek-V2 and
                   V3, 2024).
    """

    is_sigmoid: bool = False
    is_normalized: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


class Routing(NamedTuple):
    """Which experts the tokens go to, and with which weights; written by `route`."""

    logits: Tensor  # float32 [num_tokens, rows of the router]
    weights: Tensor  # float32 [num_tokens, top_k], then one column for the shared expert's gate
    places: Tensor  # int32 [num_tokens, top_k]: row of each assignment, -1 for padding tokens
    order: Tensor  # int32 [num_tokens * top_k]: token * top_k + j of each row, -1 after the last
    offsets: Tensor  # int32 [num_experts + 1]: where the rows of each expert begin


def route(
    x: Tensor, router: Tensor, correction_bias: Tensor | None, slot_mapping: Tensor, rule: Rule,
    routing: Routing,
) -> None:  # fmt: skip
    """Choose each token's experts, of equal scores the lower index, and sort assignments by expert.

    x [num_tokens, hidden]; router [num_experts, hidden], with one more row if a shared expert has a
    gate, whose sigmoid becomes the last of the weights. correction_bias float32 [num_experts] is
    added to the scores for the choice, but not for the weights. slot_mapping int64 [num_tokens], -1
    for padding. Scores are float32.
    """
    native.route(
        x, router, correction_bias, slot_mapping, rule.is_sigmoid, rule.is_normalized, rule.scale,
        rule.num_groups, rule.top_groups, *routing,
    )  # fmt: skip


def grouped_linear_silu_mul(
    x: Tensor, weight: Tensor, routing: Routing, out: Tensor, sorted_x: Tensor
) -> None:
    """silu(gate) * up of gate | up = x weight[e]^T for each expert e of a token, rounded once.

    x [num_tokens, hidden], weight [num_experts, 2 n, hidden] -> out [rows, n]. sorted_x
    [rows, hidden] is scratch memory for x in the order of the rows.
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
    """The weighted sum of the outputs of a token's experts -> out [num_tokens, n].

    rows [num_tokens * top_k, n]: the experts' outputs. shared [num_tokens, n]: the output of a
    shared expert, multiplied by the last weight if it has a gate. Added up in the order of the
    token's experts, then `shared`, then, if is_adding, the previous contents of out; rounded once.
    """
    native.combine_experts(rows, routing.places, routing.weights, shared, is_adding, out)


def _is_torch_faster(x: Tensor, weight: Tensor, routing: Routing, epilogue: int) -> bool:
    """Whether, on a CPU, an expert has more rows than the native op is efficient for."""
    if x.is_cuda:
        return False
    return not native.serves_linear(weight[0], longest_group(routing), epilogue)


def longest_group(routing: Routing) -> int:
    """The largest number of rows of an expert. CPU only: on a card, reading it would have to wait
    for the router's kernel."""
    return int(routing.offsets.diff().max())


def sort_rows(x: Tensor, routing: Routing, sorted_x: Tensor) -> None:
    """Copy x [num_tokens, hidden] in the order of the rows -> sorted_x; entries after the last row
    are not written. CPU only, as `longest_group`."""
    count, top_k = int(routing.offsets[-1]), routing.places.shape[1]
    torch.index_select(x, 0, routing.order[:count] // top_k, out=sorted_x[:count])


def chunks(routing: Routing) -> list[tuple[int, int, int]]:
    """All rows as ranges (expert, begin, end) of one expert and at most CHUNK_ROWS rows each."""
    offsets = routing.offsets.tolist()
    return [
        (expert, begin, min(begin + CHUNK_ROWS, end))
        for expert, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True))
        for begin in range(start, end, CHUNK_ROWS)
    ]
