"""The gated MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch

from pyserve import ops
from pyserve.model.activations import Arena, MLPActivations
from pyserve.model.destination import Destinations
from pyserve.model.layer_config import LayerConfig
from pyserve.model.layers.linear import Linear, Output, fused_outputs
from pyserve.model.placement import Placement


class MLP:
    __slots__ = ("gate_up", "down", "_dtype")

    def __init__(
        self, name: str, layer: LayerConfig, hidden_size: int, placement: Placement
    ) -> None:
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

    def __call__(self, x: torch.Tensor, act: MLPActivations, out: torch.Tensor) -> None:
        """x [num_tokens, hidden_size] -> out, of the same shape"""
        self.gate_up(x, act.gate_up)
        ops.silu_mul(act.gate_up, act.activated)
        self.down(act.activated, out)

    def activations(self, arena: Arena, num_tokens: int) -> MLPActivations:
        width = self.gate_up.out_features
        return MLPActivations(
            gate_up=arena.take(num_tokens, width, dtype=self._dtype),
            activated=arena.take(num_tokens, width // 2, dtype=self._dtype),
        )

    def destinations(self) -> Destinations:
        return self.gate_up.destinations() | self.down.destinations()
