"""The gated MLP: down(activation(gate(x)) * up(x)) (Shazeer 2020: SwiGLU, GEGLU)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyserve import ops
from pyserve.model.activations import Arena, MLPActivations
from pyserve.model.context import ForwardContext
from pyserve.model.destination import Destinations
from pyserve.model.layer_config import Activation, LayerNames, MLPConfig
from pyserve.model.layers.linear import Apply, Linear, Output, fused_outputs
from pyserve.model.placement import Placement

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": ops.silu_mul,
    "gelu_tanh": ops.gelu_tanh_mul,
}


class MLP:
    """The MLP of the checkpoint's module `name`.

    is_adding   `out` is the residual stream, to which the output is added; otherwise `out` is
                overwritten. True if the Linear `down` has_add and not is_added_later: the caller
                then norms or weights the output before adding it.
    is_partial  `out` is this rank's part of a sum over ranks, which the caller must compute. Only
                if is_summed_later allows it.
    """

    __slots__ = (
        "gate_up", "down", "is_adding", "is_partial", "_activation", "_is_fused", "_project",
        "_dtype",
    )  # fmt: skip

    def __init__(
        self, name: str, config: MLPConfig, names: LayerNames, hidden_size: int,
        placement: Placement, *, is_added_later: bool, is_summed_later: bool,
    ) -> None:  # fmt: skip
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
            is_summed_later=is_summed_later,
        )
        self._activation = _ACTIVATIONS[config.activation]
        self._is_fused = config.activation == "silu" and self.gate_up.has_silu_mul
        self.is_adding = self.down.has_add and not is_added_later
        self.is_partial = self.down.is_partial
        self._project: Apply = self.down.add if self.is_adding else self.down

    def __call__(
        self, x: torch.Tensor, ctx: ForwardContext, act: MLPActivations, out: torch.Tensor
    ) -> None:
        """x [num_tokens, hidden_size] -> out, of the same shape."""
        if self._is_fused:
            self.gate_up.silu_mul(x, act.gate_up, act.activated, ctx.adapters)
        else:
            self.gate_up(x, act.gate_up, ctx.adapters)
            self._activation(act.gate_up, act.activated)
        self._project(act.activated, out, ctx.adapters)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The Linears whose matrices every step reads."""
        return self.gate_up, self.down

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that its activations depend on."""
        return (self.gate_up.out_features,)

    @property
    def has_norm_factors(self) -> bool:
        """Whether the norms before and after it can be fused into its Linears."""
        is_before = self.gate_up.has_norm_factor and self._is_fused
        return is_before and self.is_adding and self.down.has_norm_factor

    def activations(self, arena: Arena, num_tokens: int) -> MLPActivations:
        width = self.gate_up.out_features
        return MLPActivations(
            gate_up=arena.take(num_tokens, width, dtype=self._dtype),
            activated=arena.take(num_tokens, width // 2, dtype=self._dtype),
        )

    def destinations(self) -> Destinations:
        return self.gate_up.destinations() | self.down.destinations()
