"""The gated MLP: down(silu(gate(x)) * up(x)) (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch

from pyserve import ops
from pyserve.model.config import ModelConfig
from pyserve.model.destination import Destinations
from pyserve.model.layers.linear import Linear, Output
from pyserve.model.placement import Placement


class MLP:
    __slots__ = ("gate_up", "down")

    def __init__(self, name: str, config: ModelConfig, placement: Placement) -> None:
        size = config.intermediate_size
        self.gate_up = Linear(
            [Output(f"{name}.gate_proj", size), Output(f"{name}.up_proj", size)],
            config.hidden_size,
            placement,
            has_bias=config.mlp_bias,
            shard="column",
        )
        self.down = Linear(
            [Output(f"{name}.down_proj", config.hidden_size)],
            size,
            placement,
            has_bias=config.mlp_bias,
            shard="row",
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden_size] -> the same shape"""
        return self.down(ops.silu_mul(self.gate_up(x)))

    def destinations(self) -> Destinations:
        return self.gate_up.destinations() | self.down.destinations()
