"""Plain-torch twins of the ops of a mixture of experts; see reference.py and experts.py."""

from __future__ import annotations

import torch
from torch import Tensor

from pyserve.ops.reference_linear import linear, linear_silu_mul

SUM_EPS = 1e-20  # added to a sum of sigmoids, which may be 0, as in DeepSeek-V3


def route(
    x: Tensor, router: Tensor, correction_bias: Tensor | None, slot_mapping: Tensor,
    is_sigmoid: bool, is_normalized: bool, scale: float, num_groups: int, top_groups: int,
    logits: Tensor, weights: Tensor, places: Tensor, order: Tensor, offsets: Tensor,
) -> None:  # fmt: skip
    """Choose each token's experts and sort the tokens by them."""
    num_experts, top_k = len(offsets) - 1, places.shape[1]
    logits.copy_(x.float() @ router.float().T)
    scores = logits[:, :num_experts]
    scores = scores.sigmoid() if is_sigmoid else scores.softmax(-1)
    choices = scores if correction_bias is None else scores + correction_bias
    choices = choices.masked_fill(choices.isnan(), -torch.inf)
    if top_groups < num_groups:
        choices = _limited(choices, num_groups, top_groups, num_summed=2 if is_sigmoid else 1)
    experts = _largest(choices, top_k)
    chosen = scores.gather(1, experts)
    if is_normalized:
        chosen = chosen / (chosen.sum(1, keepdim=True) + (SUM_EPS if is_sigmoid else 0.0))
    is_there = slot_mapping >= 0
    weights[:, :top_k] = chosen * scale
    weights[:, top_k:] = logits[:, num_experts:].sigmoid()
    weights[~is_there] = 0.0
    # Padding tokens get an expert number that sorts behind all real experts.
    experts = experts.masked_fill(~is_there[:, None], num_experts).flatten()
    sorted_experts, sorted_order = experts.sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=x.device)
    offsets.copy_(torch.searchsorted(sorted_experts, bounds))
    is_row = sorted_experts < num_experts
    order.copy_(sorted_order.masked_fill(~is_row, -1))
    row = torch.arange(len(order), dtype=torch.int32, device=x.device)
    flat = torch.full_like(row, -1)
    flat[sorted_order[is_row]] = row[is_row]
    places.copy_(flat.view_as(places))


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values in each row, in descending order; of equal values the
    lower index comes first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _limited(choices: Tensor, num_groups: int, top_groups: int, num_summed: int) -> Tensor:
    """`choices` with -inf in all groups but the top_groups best ones. A group's score is the sum of
    its num_summed largest values."""
    groups = choices.view(len(choices), num_groups, -1)
    best = groups.topk(min(num_summed, groups.shape[-1]), dim=-1).values.sum(-1)
    is_out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, _largest(best, top_groups), False)
    return groups.masked_fill(is_out[..., None], -torch.inf).view_as(choices)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, max_group: int, out: Tensor) -> None:
    """`linear` of each expert's rows; no expert has more than max_group rows."""
    assert not len(offsets) or int(offsets.diff().max()) <= max_group
    bounds = offsets.tolist()
    for matrix, begin, end in zip(weight, bounds[:-1], bounds[1:], strict=True):
        linear(x[begin:end], matrix, None, out[begin:end])


def grouped_linear_silu_mul(
    x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, sorted_x: Tensor, out: Tensor
) -> None:
    """linear_silu_mul of each expert's rows of x; the token of a row is order[row] // top_k."""
    bounds, top_k = offsets.tolist(), len(order) // max(1, len(x))
    count = bounds[-1]
    sorted_x[:count] = x[order[:count].long() // top_k]
    for matrix, begin, end in zip(weight, bounds[:-1], bounds[1:], strict=True):
        linear_silu_mul(sorted_x[begin:end], matrix, None, out[begin:end])


def combine_experts(
    rows: Tensor, places: Tensor, weights: Tensor, shared: Tensor | None, is_adding: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """out = the weighted sum of each token's rows, plus shared, plus out if is_adding."""
    sums = torch.zeros(out.shape, device=out.device)
    for j, of_each in enumerate(places.long().T):
        is_there = of_each >= 0
        sums[is_there] += weights[is_there, j, None] * rows[of_each[is_there]].float()
    if shared is not None:
        has_gate = weights.shape[1] > places.shape[1]
        sums += shared.float() * (weights[:, -1:] if has_gate else 1.0)
    out.copy_(out.float() + sums if is_adding else sums)
