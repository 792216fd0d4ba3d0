"""The gated MLP: down(activation(gate(x)) * up(x)) (Shazeer 2020: SwiGLU, GEGLU)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyserve import ops
from pyserve.model.activations import Arena, MLPActivations
from pyserve.model.destination import Destinations
from pyserve.model.layer_config import Activation, LayerConfig
from pyserve.model.layers.linear import Apply, Linear, Output, fused_outputs
from pyserve.model.placement import Placement

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": ops.silu_mul,
    "gelu_tanh": ops.gelu_tanh_mul,
}


class MLP:
    """`is_adding`: it adds to its `out`, the residual stream, instead of overwriting it. So it does
    where no norm comes before that and its last Linear can."""

    __slots__ = (
        "gate_up", "down", "is_adding", "_activate", "_activation", "_is_fused", "_project",
        "_dtype",
    )  # fmt: skip

    def __init__(
        self, name: str, layer: LayerConfig, hidden_size: int, placement: Placement, *,
        has_norm_after: bool,
    ) -> None:  # fmt: skip
        config, names = layer.mlp, layer.names
        name = f"{name}.{names.mlp}"
        self._dtype = placement.dtype
        self.gate_up = Linear(
            fused_outputs(name, names.gate_up, [(config.size, 1)] * 2),
            hidden_size,
            placement,
            has_bias=config.has_bias,
            shard="column",
        )
        self.down = Linear(
            [Output(f"{name}.{names.down}", hidden_size)],
            config.size,
            placement,
            has_bias=config.has_bias,
            shard="row",
        )
        self._activation = _ACTIVATIONS[config.activation]
        self._is_fused = config.activation == "silu" and self.gate_up.has_silu_mul
        self._activate = self.gate_up.silu_mul if self._is_fused else self._two_calls
        self.is_adding = self.down.has_add and not has_norm_after
        self._project: Apply = self.down.add if self.is_adding else self.down

    def __call__(self, x: torch.Tensor, act: MLPActivations, out: torch.Tensor) -> None:
        """x [num_tokens, hidden_size] -> out, of the same shape"""
        self._activate(x, act.gate_up, act.activated)
        self._project(act.activated, out)

    @property
    def has_norm_factors(self) -> bool:
        """Whether the norms before and behind can be factors."""
        is_before = self.gate_up.has_norm_factor and self._is_fused
        return is_before and self.is_adding and self.down.has_norm_factor

    def _two_calls(self, x: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self.gate_up(x, gate_up)
        self._activation(gate_up, out)

    def activations(self, arena: Arena, num_tokens: int) -> MLPActivations:
        width = self.gate_up.out_features
        return MLPActivations(
            gate_up=arena.take(num_tokens, width, dtype=self._dtype),
            activated=arena.take(num_tokens, width // 2, dtype=self._dtype),
        )

    def destinations(self) -> Destinations:
        return self.gate_up.destinations() | self.down.destinations()
