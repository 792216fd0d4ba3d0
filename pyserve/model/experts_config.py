"""Mixtures of experts: which layers of a model have one and of what kind, read from config.json.
Imports no torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pyserve.errors import ConfigError
from pyserve.limits import MAX_EXPERT_GROUPS, MAX_EXPERTS, MAX_TOP_EXPERTS
from pyserve.model.fields import Fields

MAX_SIZE = 2**22  # limit of an expert's inner width


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts in the place of an MLP.

    For each token a router chooses `top_k` of `num_experts` gated MLPs of inner width `size`, and
    the output is the weighted sum of theirs.

    is_sigmoid, is_normalized, scale, num_groups, top_groups
                      how the router's logits become choices and weights; see ops.experts.Rule.
    has_correction_bias
                      the router has a bias for each expert that affects the choice but not the
                      weights.
    shared_size       inner width of a shared expert that every token goes through; 0: none.
    has_shared_gate   the shared expert's output is multiplied by the sigmoid of a gate's logit.
    """

    size: int
    num_experts: int
    top_k: int
    is_sigmoid: bool = False
    is_normalized: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    has_correction_bias: bool = False
    shared_size: int = 0
    has_shared_gate: bool = False
    activation: Literal["silu"] = "silu"

    @property
    def widths(self) -> tuple[int, ...]:
        """Inner widths that tensor parallel ranks divide among them."""
        return (self.size, self.shared_size) if self.shared_size else (self.size,)


class ExpertsKeys(msgspec.Struct, frozen=True, kw_only=True):
    """How config.json of a family describes its mixtures of experts.

    num_experts      the keys that may hold the number of experts.
    default_num      the number of experts if none of these keys is present.
    size             the key of an expert's inner width.
    is_sigmoid       scores are sigmoids, and there is a correction bias; n_group, topk_group and
                     routed_scaling_factor are read.
    has_topk_method  scores are softmaxes; routed_scaling_factor is read, and if `topk_method` is
                     group_limited_greedy also n_group and topk_group.
    is_normalized    whether a token's weights are divided by their sum: always, never, or
                     "config": as `norm_topk_prob` says.
    shared_size      the key of the inner width of a shared expert that has a gate; None: no such.
    num_shared       the key of the number of shared experts without a gate, which are computed as
                     one of that many times the inner width; None: no such.
    dense_layers     which layers have a plain MLP. "none": no layer. "step": those in
                     `mlp_only_layers`, and all but each `decoder_sparse_step`th. "first": the first
                     `first_k_dense_replace`. "types": those that `mlp_layer_types` calls dense, or
                     as "first" if the key is absent.
    """

    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    default_num: int
    size: str = "moe_intermediate_size"
    is_sigmoid: bool = False
    has_topk_method: bool = False
    is_normalized: Literal["always", "never", "config"] = "config"
    shared_size: str | None = None
    num_shared: str | None = None
    dense_layers: Literal["none", "step", "first", "types"] = "step"

    @property
    def known_keys(self) -> frozenset[str]:
        """Keys of config.json about mixtures that are read or known to be harmless."""
        keys = {
            *self.num_experts, self.size, "num_experts_per_tok", "router_aux_loss_coef",
            "output_router_logits", "router_jitter_noise",
        }  # fmt: skip
        if self.is_normalized == "config":
            keys.add("norm_topk_prob")
        if self.is_sigmoid or self.has_topk_method:
            keys |= {"n_group", "topk_group", "routed_scaling_factor"}
        if self.has_topk_method:
            keys.add("topk_method")
        keys |= {key for key in (self.shared_size, self.num_shared) if key is not None}
        if self.dense_layers == "step":
            keys |= {"mlp_only_layers", "decoder_sparse_step"}
        elif self.dense_layers in ("first", "types"):
            keys |= {"first_k_dense_replace", "mlp_layer_types"}
        return frozenset(keys)


def experts_from_fields(
    fields: Fields, keys: ExpertsKeys, num_layers: int
) -> list[ExpertsConfig | None]:
    """The mixture of each layer; None for a layer with a plain MLP. Raises ConfigError."""
    num_experts = _num_experts(fields, keys)
    size = fields.integer(keys.size, 1, MAX_SIZE)
    shared_size = 0
    if keys.shared_size is not None:
        shared_size = fields.integer(keys.shared_size, 1, MAX_SIZE)
    elif keys.num_shared is not None:
        shared_size = size * fields.integer(keys.num_shared, 0, MAX_SIZE // size)
    num_groups, top_groups, scale = _groups(fields, keys, num_experts)
    most = min(MAX_TOP_EXPERTS, num_experts // num_groups * top_groups)
    config = ExpertsConfig(
        size=size,
        num_experts=num_experts,
        top_k=fields.integer("num_experts_per_tok", 1, most),
        is_sigmoid=keys.is_sigmoid,
        scale=scale,
        num_groups=num_groups,
        top_groups=top_groups,
        has_correction_bias=keys.is_sigmoid,
        is_normalized=keys.is_normalized == "always"
        or (keys.is_normalized == "config" and fields.boolean("norm_topk_prob", default=False)),
        shared_size=shared_size,
        has_shared_gate=keys.shared_size is not None,
    )
    return [config if sparse else None for sparse in _are_sparse(fields, keys, num_layers)]


def _are_sparse(fields: Fields, keys: ExpertsKeys, num_layers: int) -> list[bool]:
    """For each layer, whether it has the mixture."""
    if keys.dense_layers == "none":
        return [True] * num_layers
    if keys.dense_layers == "step":
        step = fields.integer("decoder_sparse_step", 1, num_layers, default=1)
        dense = fields.integers("mlp_only_layers", 0, num_layers - 1)
        return [(i + 1) % step == 0 and i not in dense for i in range(num_layers)]
    num_dense = fields.integer("first_k_dense_replace", 0, num_layers, default=1)
    are_sparse = [i >= num_dense for i in range(num_layers)]
    key = "mlp_layer_types"
    if keys.dense_layers == "first" or not fields.has(key):
        return are_sparse
    types = fields.strings(key)
    if len(types) != num_layers or set(types) - {"dense", "sparse"}:
        raise fields.refuse(key, f"must be {num_layers} of dense and sparse")
    if fields.has("first_k_dense_replace") and [it == "sparse" for it in types] != are_sparse:
        raise fields.refuse(key, f"contradicts first_k_dense_replace ({num_dense})")
    return [it == "sparse" for it in types]


def _groups(fields: Fields, keys: ExpertsKeys, num_experts: int) -> tuple[int, int, float]:
    """(num_groups, top_groups, scale) from n_group, topk_group and routed_scaling_factor."""
    if not (keys.is_sigmoid or keys.has_topk_method):
        return 1, 1, 1.0
    scale = fields.number("routed_scaling_factor", 0.0, 1e6, default=1.0)
    if keys.has_topk_method:
        method = fields.string("topk_method", default="greedy", is_nullable=True)
        if method not in ("greedy", "group_limited_greedy"):
            raise fields.refuse("topk_method", "must be greedy or group_limited_greedy")
        if method == "greedy":
            return 1, 1, scale
    num_groups = fields.integer("n_group", 1, MAX_EXPERT_GROUPS, default=1)
    if num_experts % num_groups:
        raise ConfigError(
            f"config.json: n_group must divide the {num_experts} experts, got {num_groups}"
        )
    top_groups = fields.integer("topk_group", 1, num_groups, default=1)
    return num_groups, top_groups, scale


def _num_experts(fields: Fields, keys: ExpertsKeys) -> int:
    num_experts = None
    for key in keys.num_experts:
        if not fields.has(key):
            continue
        number = fields.integer(key, 1, MAX_EXPERTS)
        if num_experts not in (None, number):
            raise fields.refuse(key, f"must be {num_experts}, as {keys.num_experts[0]} is")
        num_experts = number
    nulls = [key for key in keys.num_experts if fields.is_null(key)]
    if num_experts is None and nulls:
        raise fields.refuse(nulls[0], f"must be an integer in [1, {MAX_EXPERTS}]")
    return num_experts or keys.default_num
