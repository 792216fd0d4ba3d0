"""A mixture of experts: each token goes through a few of many gated MLPs, which a router chooses
(Shazeer et al. 2017), and in some families also through a shared expert.
"""

from __future__ import annotations

import torch

from pyserve.model.activations import Arena, ExpertsActivations
from pyserve.model.context import ForwardContext
from pyserve.model.destination import Destination, Destinations, row_destinations
from pyserve.model.expert_schemes import make_experts
from pyserve.model.experts_config import ExpertsConfig
from pyserve.model.layer_config import LayerNames, MLPConfig
from pyserve.model.layers.linear import Linear, fused_outputs, shard_rows
from pyserve.model.layers.mlp import MLP
from pyserve.model.placement import Placement, Rows, Shard
from pyserve.ops import experts

CORRECTION_BIAS = "e_score_correction_bias"  # name of this tensor beside the router's weight


class Experts:
    """Takes the place of an MLP; `is_adding` and `is_partial` are as MLP's.

    gate_up           the experts' matrices, [2 * size, hidden_size] each: rows of gate, then of up
    down              the experts' matrices, [hidden_size, size] each
    router            [num_experts, hidden_size], and one more row for the shared expert's gate if
                      there is one
    correction_bias   float32 [num_experts], or None
    shared            the shared expert that all tokens go through, or None
    """

    __slots__ = (
        "config", "gate_up", "down", "router", "correction_bias", "shared", "is_adding",
        "is_partial", "_name", "_names", "_rule", "_placement", "_columns", "_group",
    )  # fmt: skip

    def __init__(
        self, name: str, config: ExpertsConfig, names: LayerNames, hidden_size: int,
        placement: Placement, *, is_added_later: bool, is_summed_later: bool,
    ) -> None:  # fmt: skip
        self.config, self._name, self._names = config, name, names
        self._placement = placement

        def empty(*shape: int, dtype: torch.dtype = placement.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=placement.device)

        self._columns = placement.share(config.size)
        gate_up, down = [], []
        for expert in range(config.num_experts):
            prefix = f"{name}.{names.experts}.{expert}"
            outputs = fused_outputs(prefix, names.gate_up, [(config.size, 1)] * 2)
            gate_up.append(tuple(shard_rows(outputs, placement, "column")))
            down.append((Rows(f"{prefix}.{names.down}", hidden_size, 0, hidden_size, hidden_size),))
        self.gate_up = make_experts(gate_up, Shard(0, hidden_size, hidden_size), placement)
        self.down = make_experts(down, self._columns, placement)
        self.router = empty(config.num_experts + config.has_shared_gate, hidden_size)
        self.correction_bias = None
        if config.has_correction_bias:
            self.correction_bias = empty(config.num_experts, dtype=torch.float32)
        self.shared: MLP | None = None
        if config.shared_size:
            shared = MLPConfig(size=config.shared_size, activation=config.activation)
            self.shared = MLP(
                f"{name}.{names.shared_expert}", shared, names, hidden_size, placement,
                is_added_later=True, is_summed_later=True,
            )  # fmt: skip
        has_parts = placement.tp_size > 1
        self.is_adding = not is_added_later and not has_parts
        self.is_partial = has_parts and is_summed_later
        self._group = placement.group if has_parts and not is_summed_later else None
        self._rule = experts.Rule(
            config.is_sigmoid, config.is_normalized, config.scale, config.num_groups,
            config.top_groups,
        )  # fmt: skip

    def __call__(
        self, x: torch.Tensor, ctx: ForwardContext, act: ExpertsActivations, out: torch.Tensor
    ) -> None:
        """x [num_tokens, hidden_size] -> out, of the same shape."""
        experts.route(
            x, self.router, self.correction_bias, ctx.slot_mapping, self._rule, act.routing
        )
        if self.shared is not None:
            assert act.shared is not None and act.shared_out is not None
            self.shared(x, ctx, act.shared, act.shared_out)
        self.gate_up.silu_mul(x, act.routing, act.activated, act.rows)
        self.down(act.activated, act.routing, act.rows)
        experts.combine_experts(
            act.rows, act.routing, act.shared_out, out, is_adding=self.is_adding
        )
        if self._group is not None:
            self._group.all_reduce(out)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The Linears whose matrices every step reads: those of the shared expert."""
        return () if self.shared is None else self.shared.linears

    @property
    def sizes(self) -> tuple[int, ...]:
        """As MLP's."""
        config = self.config
        shared = () if self.shared is None else self.shared.sizes
        return (config.num_experts, config.top_k, len(self.router), self._columns.size, *shared)

    @property
    def has_norm_factors(self) -> bool:
        """As MLP's. False, because the router needs the norm's output."""
        return False

    @property
    def bytes_each(self) -> int:
        """Bytes of one expert's matrices on this rank."""
        return (self.gate_up.nbytes + self.down.nbytes) // self.config.num_experts

    @property
    def params_each(self) -> int:
        """Parameters of one expert on this rank."""
        return (self.gate_up.num_params + self.down.num_params) // self.config.num_experts

    @property
    def params_of_whole_expert(self) -> int:
        """Parameters of one expert on all ranks together."""
        return 3 * self.config.size * self.router.shape[1]

    def activations(self, arena: Arena, num_tokens: int) -> ExpertsActivations:
        config, dtype = self.config, self._placement.dtype
        num_rows, hidden_size = num_tokens * config.top_k, self.router.shape[1]
        num_weights = config.top_k + config.has_shared_gate
        routing = experts.Routing(
            logits=arena.take(num_tokens, len(self.router), dtype=torch.float32),
            weights=arena.take(num_tokens, num_weights, dtype=torch.float32),
            places=arena.take(num_tokens, config.top_k, dtype=torch.int32),
            order=arena.take(num_rows, dtype=torch.int32),
            offsets=arena.take(config.num_experts + 1, dtype=torch.int32),
        )
        shared = shared_out = None
        if self.shared is not None:
            shared = self.shared.activations(arena, num_tokens)
            shared_out = arena.take(num_tokens, hidden_size, dtype=dtype)
        return ExpertsActivations(
            routing=routing,
            activated=arena.take(num_rows, self._columns.size, dtype=dtype),
            rows=arena.take(num_rows, hidden_size, dtype=dtype),
            shared=shared,
            shared_out=shared_out,
        )

    def destinations(self) -> Destinations:
        """One tensor for each expert's matrix. Checkpoints that fuse all experts of a layer into
        one tensor are converted by fused_experts.py."""
        destinations = self._router_destinations()
        destinations |= self.gate_up.destinations() | self.down.destinations()
        return destinations if self.shared is None else destinations | self.shared.destinations()

    def _router_destinations(self) -> Destinations:
        names, config = self._names, self.config
        num_experts, hidden_size = config.num_experts, self.router.shape[1]
        router = f"{self._name}.{names.router}"
        rows = [Rows(router, num_experts, 0, num_experts, num_experts)]
        if config.has_shared_gate:
            rows.append(Rows(f"{self._name}.{names.shared_gate}", 1, 0, 1, 1))
        whole = Shard(0, hidden_size, hidden_size)
        destinations = row_destinations("weight", self.router, rows, whole)
        if self.correction_bias is not None:
            name = f"{router}.{CORRECTION_BIAS}"
            destinations[name] = Destination.whole(self.correction_bias)
        return destinations
