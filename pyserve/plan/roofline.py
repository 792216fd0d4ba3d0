"""The least time a step can take on a card: its bytes at the bandwidth, its operations at the rate.

    max(weights / bandwidth, FLOP / rate) of the linear layers, plus the KV cache that is read.

A bound, not a forecast: kernels, launches and the host add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.kv import KVSpec
from pyserve.plan.cards import Card

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# AWQ, int4 in groups of 128: a 16-bit scale and a 4-bit zero point a group.
INT4_BITS = 4 + (16 + 4) / 128


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a model holds and what a step of it reads, from shapes alone.

    dtype           of what is computed, and of the KV cache
    weight_bytes    of everything that is held
    layer_bytes     of the layers' matrices: every step reads them, whatever its rows
    head_bytes      of the output head: read for the rows that are sampled
    """

    dtype: torch.dtype
    weight_bytes: int
    num_params: int
    layer_bytes: int
    layer_params: int
    head_bytes: int
    head_params: int
    kv_specs: tuple[KVSpec, ...]
    num_heads: int

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(spec.bytes_per_block(1) for spec in self.kv_specs)

    def kv_bytes(self, context_len: int) -> int:
        """Read by one sequence's next token."""
        return sum(
            spec.bytes_per_block(1) * min(context_len, spec.window or context_len)
            for spec in self.kv_specs
        )


def measure_model(model: ModelConfig, dtype: torch.dtype, *, is_int4: bool = False) -> ModelSizes:
    """Sizes of `model` in `dtype`; is_int4: its layers' matrices as AWQ would store them."""
    shapes = Decoder(model, dtype=dtype, device=torch.device("meta"), max_model_len=1)
    views = {name: place.view for name, place in shapes.destinations().items()}
    layers = [
        view for name, view in views.items() if view.dim() == 2 and name not in (EMBEDDING, HEAD)
    ]
    layer_params = sum(view.numel() for view in layers)
    dense_bytes = sum(view.nbytes for view in layers)
    layer_bytes = int(layer_params * INT4_BITS / 8) if is_int4 else dense_bytes
    head = views.get(HEAD, views[EMBEDDING])
    return ModelSizes(
        dtype=dtype,
        weight_bytes=sum(view.nbytes for view in views.values()) - dense_bytes + layer_bytes,
        num_params=sum(view.numel() for view in views.values()),
        layer_bytes=layer_bytes,
        layer_params=layer_params,
        head_bytes=head.nbytes,
        head_params=head.numel(),
        kv_specs=tuple(shapes.kv_specs()),
        num_heads=model.num_heads,
    )


@dataclass(frozen=True, slots=True)
class StepFloor:
    """Seconds of a decode step, and what its linear layers wait for: "bandwidth" or "FLOP"."""

    seconds: float
    bound: str


def decode_floor(sizes: ModelSizes, card: Card, *, batch: int, context_len: int) -> StepFloor:
    """One token for each of `batch` sequences with `context_len` tokens behind each."""
    read_s = (sizes.layer_bytes + sizes.head_bytes) / (card.bandwidth_tb * 1e12)
    compute_s = 2 * (sizes.layer_params + sizes.head_params) * batch / (card.bf16_tflops * 1e12)
    kv_s = batch * sizes.kv_bytes(context_len) / (card.bandwidth_tb * 1e12)
    return StepFloor(
        seconds=max(read_s, compute_s) + kv_s,
        bound="FLOP" if compute_s > read_s else "bandwidth",
    )


def prefill_floor_s(sizes: ModelSizes, card: Card, num_tokens: int) -> float:
    """Seconds to the first token of a prompt, in one step: one row of it is sampled."""
    read_s = (sizes.layer_bytes + sizes.head_bytes) / (card.bandwidth_tb * 1e12)
    flop = 2 * (sizes.layer_params * num_tokens + sizes.head_params)
    flop += _attention_flop(sizes.kv_specs, sizes.num_heads, num_tokens)
    return max(read_s, flop / (card.bf16_tflops * 1e12))


def _attention_flop(specs: Sequence[KVSpec], num_heads: int, num_tokens: int) -> int:
    """QK^T and PV over the pairs of tokens that see each other."""
    flop = 0
    for spec in specs:
        window = min(num_tokens, spec.window or num_tokens)
        num_pairs = window * (window + 1) // 2 + (num_tokens - window) * window
        flop += 4 * num_heads * spec.head_dim * num_pairs
    return flop
