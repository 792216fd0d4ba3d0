"""The least time of a step on a card: its bytes at the bandwidth, its operations at the FLOP rate.

For decoding: max(weights / bandwidth, FLOP / rate) of the linear layers, plus the time to read the
KV cache.

This is a lower bound, not a forecast: kernels, launches and the host take more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.kv import KVSpec
from pyserve.model.layers.experts import Experts
from pyserve.model.placement import META, Placement
from pyserve.model.sharing import check_sharing
from pyserve.plan.cards import Card


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What one of the cards that share a model holds of it, and what a step reads there, from
    shapes.

    dtype          dtype of the activations and of the KV cache
    shapes         this card's part of the model, on the meta device
    weight_bytes   bytes of all weights on this card
    num_params     parameters of the whole model
    layer_bytes    bytes of the matrices of the layers, without experts; every step reads them all
    layer_params   parameters in these matrices
    mixtures       the layers' mixtures of experts; a step reads the experts that its tokens choose
    head_bytes     bytes of the output head, which is read for sampled rows; 0 for a pooling model
    head_params    parameters of the output head
    kv_specs       what the KV cache holds for each layer
    flop_per_pair  floating-point operations of attention in one layer, for one query and key token
    """

    dtype: torch.dtype
    shapes: Decoder
    weight_bytes: int
    num_params: int
    layer_bytes: int
    layer_params: int
    mixtures: tuple[Experts, ...]
    head_bytes: int
    head_params: int
    kv_specs: tuple[KVSpec, ...]
    flop_per_pair: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache of this card, over all layers."""
        return sum(spec.bytes_per_block(1) for spec in self.kv_specs)

    @property
    def num_params_of_a_token(self) -> int:
        """Parameters of the whole model that one token uses: of the experts, only the
        chosen ones.
        """
        return self.num_params - sum(
            (mixture.config.num_experts - mixture.config.top_k) * mixture.params_of_whole_expert
            for mixture in self.mixtures
        )

    def read_bytes(self, num_tokens: int) -> float:
        """Expected bytes of matrices that a step of num_tokens reads here, if experts are chosen
        evenly.
        """
        read = float(self.layer_bytes + self.head_bytes)
        for mixture in self.mixtures:
            share = mixture.config.top_k / mixture.config.num_experts
            num_read = mixture.config.num_experts * (1 - (1 - share) ** num_tokens)
            read += num_read * mixture.bytes_each
        return read

    @property
    def layer_params_of_a_token(self) -> int:
        """Parameters of the layers on this card that one token uses."""
        chosen = (mixture.config.top_k * mixture.params_each for mixture in self.mixtures)
        return self.layer_params + sum(chosen)

    def kv_bytes(self, context_len: int) -> int:
        """Bytes of the KV cache that the next token of one sequence reads on this card."""
        return sum(
            spec.bytes_per_block(1) * min(context_len, spec.window or context_len)
            for spec in self.kv_specs
        )


def measure_model(model: ModelConfig, dtype: torch.dtype, *, tp_size: int = 1) -> ModelSizes:
    """The sizes of `model`, computed in `dtype`, on one of `tp_size` cards that share each layer.

    Raises ConfigError if that many cards cannot share its layers.
    """
    check_sharing(model, tp_size)
    # Measured for the first rank, as no other rank holds more.
    shapes = build_model(model, Placement(dtype, META, tp_size=tp_size), max_model_len=1)
    tensors = shapes.destinations().values()
    linears, mixtures = shapes.layer_linears(), tuple(shapes.mixtures())
    head = shapes.head
    return ModelSizes(
        dtype=dtype,
        shapes=shapes,
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        num_params=sum(tensor.num_params for tensor in tensors),
        layer_bytes=sum(linear.matrix.nbytes for linear in linears)
        + sum(mixture.router.nbytes for mixture in mixtures),
        layer_params=sum(linear.num_params for linear in linears)
        + sum(mixture.router.numel() for mixture in mixtures),
        mixtures=mixtures,
        head_bytes=0 if head is None else head.matrix.nbytes,
        head_params=0 if head is None else head.num_params,
        kv_specs=tuple(shapes.kv_specs()),
        flop_per_pair=shapes.layers[0].attention.flop_per_pair,
    )


@dataclass(frozen=True, slots=True)
class StepFloor:
    """The least seconds of a decode step, and what bounds its linear layers:
    "bandwidth" or "FLOP".
    """

    seconds: float
    bound: str


def decode_floor(sizes: ModelSizes, card: Card, *, batch: int, context_len: int) -> StepFloor:
    """The least time for one token for each of `batch` sequences, with context_len tokens behind
    each.
    """
    read_s = sizes.read_bytes(batch) / (card.bandwidth_tb * 1e12)
    compute_s = (
        2 * (sizes.layer_params_of_a_token + sizes.head_params) * batch / (card.bf16_tflops * 1e12)
    )
    kv_s = batch * sizes.kv_bytes(context_len) / (card.bandwidth_tb * 1e12)
    return StepFloor(
        seconds=max(read_s, compute_s) + kv_s, bound="FLOP" if compute_s > read_s else "bandwidth"
    )


def prefill_floor_s(sizes: ModelSizes, card: Card, num_tokens: int) -> float:
    """The least seconds for a prompt of num_tokens in one step, of which one row is sampled."""
    read_s = sizes.read_bytes(num_tokens) / (card.bandwidth_tb * 1e12)
    flop = 2 * (sizes.layer_params_of_a_token * num_tokens + sizes.head_params)
    flop += _attention_flop(sizes.kv_specs, sizes.flop_per_pair, num_tokens)
    return max(read_s, flop / (card.bf16_tflops * 1e12))


def _attention_flop(specs: Sequence[KVSpec], flop_per_pair: int, num_tokens: int) -> int:
    """Floating-point operations of QK^T and PV over all pairs of tokens that see each other."""
    flop = 0
    for spec in specs:
        window = min(num_tokens, spec.window or num_tokens)
        num_pairs = window * (window + 1) // 2 + (num_tokens - window) * window
        flop += flop_per_pair * num_pairs
    return flop
