"""Decoder: embedding, layers of attention and MLP with RMSNorm around them, and an output head that
computes logits or a pooler that computes embeddings and scores.

One class serves all rows of registry.py. The residual stream is one tensor that is updated in
place. A "block" (attention or MLP) either adds its output to it itself (`is_adding`), or leaves its
output for the next norm to add, which is needed if a norm or an all-reduce comes in between. The
code between the ops is kept minimal, as most of a small model's step is Python calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from pyserve import ops
from pyserve.model.activations import (
    Activations,
    Arena,
    AttentionActivations,
    LayerActivations,
    MLPActivations,
)
from pyserve.model.adapter_weights import AdapterWeights, Target
from pyserve.model.config import ModelConfig
from pyserve.model.context import ForwardContext
from pyserve.model.destination import Destinations
from pyserve.model.experts_config import ExpertsConfig
from pyserve.model.kv import KVCache, KVSpec
from pyserve.model.latent_config import LatentConfig
from pyserve.model.layer_config import LayerConfig
from pyserve.model.layers.attention import Attention
from pyserve.model.layers.embedding import Embedding
from pyserve.model.layers.experts import Experts
from pyserve.model.layers.latent_attention import LatentAttention
from pyserve.model.layers.linear import Linear, Output
from pyserve.model.layers.mlp import MLP
from pyserve.model.layers.norm import RMSNorm
from pyserve.model.layers.pooler import Pooler
from pyserve.model.layers.rotary import cos_sin_table, query_scales
from pyserve.model.placement import Placement
from pyserve.model.schemes import Scheme
from pyserve.ops import attention_plan, lora, quantised
from pyserve.ops.group import LEADER, Group

Block = Attention | LatentAttention | MLP | Experts


class DecoderLayer:
    """Attention and MLP, and the norms around them.

    The constructor decides how the norms are called: `_enter` is the norm before the attention and
    `_between` the norm before the MLP. Each is fused with adding the output of the block before it
    if that block does not add it itself, and with that block's output norm if it has one.

    below  the layer before this one, whose output the first norm reads; None for the first layer.
    """

    __slots__ = (
        "attention", "mlp", "norms", "has_norm_factors", "_enter", "_between", "_norm_of_mlp",
        "_norm_after_attention", "_is_first",
    )  # fmt: skip

    def __init__(
        self, name: str, config: LayerConfig, hidden_size: int, placement: Placement, *,
        cos_sin: torch.Tensor, query_scales: torch.Tensor | None, below: DecoderLayer | None,
    ) -> None:  # fmt: skip
        def norm(norm_name: str) -> RMSNorm:
            return RMSNorm(f"{name}.{norm_name}", hidden_size, config.norm, placement)

        has_norm_after = config.names.norms_after is not None
        self.attention: Attention | LatentAttention
        if isinstance(config.attention, LatentConfig):
            self.attention = LatentAttention(
                name, config, hidden_size, placement, cos_sin=cos_sin,
                has_norm_after=has_norm_after,
            )  # fmt: skip
        else:
            self.attention = Attention(
                name, config, hidden_size, placement, cos_sin=cos_sin, query_scales=query_scales,
                has_norm_after=has_norm_after,
            )  # fmt: skip
        self.mlp = _mlp(name, config, hidden_size, placement)
        before = [norm(norm_name) for norm_name in config.names.norms_before]
        after = [norm(norm_name) for norm_name in config.names.norms_after or ()]
        self.norms = before + after
        norm_of_attention = after[0] if after else None
        self._norm_of_mlp = after[1] if after else None
        self._enter = before[0].read if below is None else below.read_by(before[0])
        self._between = _reading(before[1], self.attention, norm_of_attention)
        self.has_norm_factors = (
            self.attention.has_norm_factors and self.mlp.has_norm_factors and not config.norm.offset
        )
        self._norm_after_attention, self._is_first = before[1], below is None

    def read_by(self, norm: RMSNorm) -> Callable[..., None]:
        """The call of `norm`, the first one after this layer, that adds this layer's output."""
        return _reading(norm, self.mlp, self._norm_of_mlp)

    @property
    def schemes(self) -> tuple[type[Scheme], ...]:
        """The Scheme classes of its matrices."""
        return tuple(type(linear.matrix) for linear in self.linears)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The Linears whose matrices every step reads; not those of routed experts."""
        return (*self.attention.linears, *self.mlp.linears)

    def __call__(
        self, ctx: ForwardContext, cache: KVCache, activations: LayerActivations,
        hidden: torch.Tensor, residual: torch.Tensor, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Run the layer; updates `residual` and writes the KV cache.

        hidden, residual  [num_tokens, hidden_size]: the input of a block, and the residual stream.
        output            [num_tokens, hidden_size]: the output of a block that does not add to
                          `residual` itself; on entry that of the layer below, if any.
        """
        attention, mlp = activations
        self._enter(output, residual, hidden)
        attended = residual if self.attention.is_adding else output
        # Typed loosely, because each kind of attention has activations of its own type.
        attend: Callable[..., None] = self.attention
        attend(hidden, ctx, cache, attention, attended)
        self._between(output, residual, hidden)
        transform: Callable[..., None] = self.mlp
        transform(hidden, ctx, mlp, residual if self.mlp.is_adding else output)

    def call_of_few(
        self, ctx: ForwardContext, cache: KVCache, activations: LayerActivations,
        hidden: torch.Tensor, residual: torch.Tensor, squares: torch.Tensor,
        next_norm: RMSNorm | None,
    ) -> None:  # fmt: skip
        """Run the layer on few tokens, with norms fused into the Linears; needs has_norm_factors.

        A Linear before a norm writes the residual times the norm's weight to `hidden` and the
        residual's sums of squares to `squares`; the Linear after it divides by the rms. On entry
        both are for this layer's first norm, on return for `next_norm`, that of the layer above.
        """
        attention, mlp = activations
        rows = ctx.adapters
        assert isinstance(self.attention, Attention)
        assert isinstance(attention, AttentionActivations)
        if self._is_first:
            self._enter(hidden, residual, hidden)
            self.attention.qkv(hidden, attention.qkv, rows)
        else:
            eps = self.norms[0].eps
            self.attention.qkv.of_scaled(hidden, squares, eps, attention.qkv, rows)
        self.attention.attend(ctx, cache, attention)
        norm = self._norm_after_attention
        self.attention.o.add_for_norm(
            attention.joined, residual, norm.weight, hidden, squares, rows
        )
        assert isinstance(self.mlp, MLP) and isinstance(mlp, MLPActivations)
        self.mlp.gate_up.silu_mul_of_scaled(
            hidden, squares, norm.eps, mlp.gate_up, mlp.activated, rows
        )
        if next_norm is None:
            self.mlp.down.add(mlp.activated, residual, rows)
        else:
            self.mlp.down.add_for_norm(
                mlp.activated, residual, next_norm.weight, hidden, squares, rows
            )

    def destinations(self) -> Destinations:
        destinations = self.attention.destinations() | self.mlp.destinations()
        for norm in self.norms:
            destinations |= norm.destinations()
        return destinations


def _mlp(name: str, config: LayerConfig, hidden_size: int, placement: Placement) -> MLP | Experts:
    names, mlp = config.names, config.mlp
    name = f"{name}.{names.mlp}"
    has_norm_after = names.norms_after is not None
    block: type[MLP] | type[Experts] = Experts if isinstance(mlp, ExpertsConfig) else MLP
    return block(
        name, mlp, names, hidden_size, placement,  # type: ignore[arg-type]
        is_added_later=has_norm_after, is_summed_later=not has_norm_after,
    )  # fmt: skip


def _reading(norm: RMSNorm, block: Block, norm_of_block: RMSNorm | None) -> Callable[..., None]:
    """The call of `norm` that follows `block`: it adds the block's output, normed by norm_of_block
    if there is one, unless the block has added it itself."""
    if norm_of_block is not None:
        assert (norm.eps, norm.offset) == (norm_of_block.eps, norm_of_block.offset)
        return partial(norm.add_normed, norm_of_block)
    if block.is_adding:
        return norm.read
    return norm.add_parts if block.is_partial else norm.add


def _one_of_each_kind(described: Sequence[object]) -> list[int]:
    """Indices of the fewest layers that together call every op that all layers call, with the same
    shapes.

    A layer's calls depend on its description, on that of the layer below, whose output it may have
    to add, and on whether it is the first or the last.
    """
    below = [None, *described[:-1]]
    last = len(described) - 1
    kinds = [(layer, below[i], i == last) for i, layer in enumerate(described)]
    return [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]


class Decoder:
    """A decoder-only model. The constructor allocates parameters; loader.py fills them."""

    def __init__(
        self, config: ModelConfig, placement: Placement, *, max_model_len: int | None = None
    ) -> None:
        is_one = placement.tp_size * placement.pp_size == 1
        assert is_one or placement.group is not None or placement.device.type == "meta"
        self.placement = placement
        max_model_len = max_model_len or config.max_model_len
        if placement.device.type == "cuda":
            assert not (lacks := config.lacking_on_cuda()), lacks
        self.config = config
        self.scratch = placement.scratch
        self.dtype = placement.dtype
        self.device = placement.device
        hidden_size = config.hidden_size
        self.embedding = Embedding(
            "model.embed_tokens", config.vocab_size, hidden_size, placement,
            scale=config.embedding_scale,
        )  # fmt: skip
        here = placement.layers(len(config.layers))
        self._described = described = config.layers[here.start : here.stop]
        ropes = {(layer.attention.rope, layer.attention.rotary_dim) for layer in described}
        tables = {
            (rope, rotary_dim): cos_sin_table(rope, rotary_dim, max_model_len, device=self.device)
            for rope, rotary_dim in ropes
        }
        scales = {rope: query_scales(rope, max_model_len, device=self.device) for rope, _ in ropes}
        self.layers: list[DecoderLayer] = []
        below: DecoderLayer | None = None
        for index, layer in zip(here, described, strict=True):
            cos_sin = tables[layer.attention.rope, layer.attention.rotary_dim]
            self.layers.append(
                DecoderLayer(
                    f"model.layers.{index}", layer, hidden_size, placement, cos_sin=cos_sin,
                    query_scales=scales[layer.attention.rope], below=below,
                )
            )  # fmt: skip
            below = self.layers[-1]
        self._next_norms = [*(layer.norms[0] for layer in self.layers[1:]), None]
        self._all_layers = range(len(self.layers))
        self._one_of_each_kind = _one_of_each_kind(
            [(layer, made.schemes) for layer, made in zip(described, self.layers, strict=True)]
        )
        # Layers with the same window share an attention plan, and so must have the same sizes.
        self._sizes_by_window = {
            layer.attention.window: made.attention.sizes
            for layer, made in zip(described, self.layers, strict=True)
        }
        self.norm = RMSNorm("model.norm", hidden_size, config.final_norm, placement)
        self._max_norm_rows = ops.max_norm_rows(self.device, self.dtype)
        if placement.quantization is not None:
            most = quantised.MAX_NORM_ROWS[placement.quantization.scheme]
            self._max_norm_rows = min(self._max_norm_rows, most)
        assert below is not None
        self._leave = below.read_by(self.norm)
        self.head: Linear | None = None
        self.pooler: Pooler | None = None
        if config.pooling is not None:
            softcap = config.logit_softcap
            self.pooler = Pooler(config.pooling, hidden_size, placement, logit_softcap=softcap)
        elif config.tie_word_embeddings:
            self.head = Linear.tied(self.embedding.weight)
        elif placement.has_ends:
            self.head = Linear(
                [Output("lm_head", config.vocab_size)], hidden_size,
                replace(placement, num_adapter_slots=0, max_adapter_rank=0), shard="vocabulary",
            )  # fmt: skip
        self._adapters = [it.adapters for it in self.layer_linears() if it.adapters is not None]
        self.num_adapter_slots = placement.num_adapter_slots
        self.max_adapter_rank = placement.max_adapter_rank

    @property
    def _group(self) -> Group:
        assert self.placement.group is not None
        return self.placement.group

    @property
    def decode_query_len(self) -> int:
        """The largest number of tokens in a row that the attention's decode kernels take."""
        return min(
            attention_plan.decode_query_len(num_heads, num_kv_heads)
            for num_heads, num_kv_heads, _ in self._sizes_by_window.values()
        )

    def plan(self, ctx: ForwardContext) -> None:
        """Compute the attention plans, which all layers share; called before `forward`."""
        for window, plan in ctx.attention_plans.items():
            num_heads, num_kv_heads, _ = self._sizes_by_window[window]
            ops.plan_attention(
                ctx.cu_seqlens_q, ctx.seq_lens, plan, num_heads=num_heads,
                num_kv_heads=num_kv_heads, window=window,
            )  # fmt: skip

    def forward(self, ctx: ForwardContext) -> torch.Tensor:
        """Run all layers; writes the KV caches.

        Returns ctx.activations.hidden, [num_tokens, hidden_size]: the hidden states after the last
        norm.
        """
        return self._forward(ctx, self._all_layers)

    def warm_up(self, ctx: ForwardContext) -> None:
        """Call all ops that `forward` calls, with the same shapes, by running only one layer of
        each kind. The result is meaningless."""
        self._forward(ctx, self._one_of_each_kind)

    def _forward(self, ctx: ForwardContext, indices: Sequence[int]) -> torch.Tensor:
        hidden, residual, output, squares, activations, _ = ctx.activations
        pp_rank = self.placement.pp_rank
        if self.placement.has_ends:
            self.embedding(ctx.input_ids, residual)
        else:
            self._group.receive(residual, pp_rank - 1)
        for index in indices:
            layer, cache, own = self.layers[index], ctx.kv_caches[index], activations[index]
            if squares is None:
                layer(ctx, cache, own, hidden, residual, output)
            else:
                norm = self._next_norms[index]
                layer.call_of_few(ctx, cache, own, hidden, residual, squares, norm)
        # Needed on every rank of a pipeline: it also adds the last block's output to the residual.
        self._leave(output, residual, hidden)
        if pp_rank + 1 < self.placement.pp_size:
            self._group.send(residual, pp_rank + 1)
        return hidden

    def to_leader(self, hidden: torch.Tensor) -> None:
        """In a pipeline, send the last rank's `hidden`, [n, hidden_size], to that of the leader."""
        last = self.placement.pp_size - 1
        if last == LEADER:
            return
        if self.placement.has_ends:
            self._group.receive(hidden, last)
        elif self.placement.pp_rank == last:
            self._group.send(hidden, LEADER)

    def compute_logits(
        self, hidden: torch.Tensor, out: torch.Tensor, parts: torch.Tensor | None = None
    ) -> None:
        """hidden [n, hidden_size] -> out [n, vocab_size] in the model's dtype.

        With several ranks only the leader gets `out`.

        parts  [num_logit_parts(n)]: with tensor parallel, scratch in which the leader gathers the
               ranks' parts of the vocabulary; None otherwise.
        """
        self.to_leader(hidden)
        if parts is None:
            if self.placement.has_ends:
                self._own_logits(hidden, out)
            return
        each = parts[: self.num_logit_parts(len(hidden))].view(-1, len(hidden), self._head_size)
        self._own_logits(hidden, each[0])
        self._group.gather(each)
        if self.placement.is_leading:
            for part, start in zip(each, range(0, out.shape[1], self._head_size), strict=False):
                columns = out[:, start : start + self._head_size]
                columns.copy_(part[:, : columns.shape[1]])

    def num_logit_parts(self, num_rows: int) -> int:
        """Elements of compute_logits' `parts` for num_rows rows; 0 without tensor parallel."""
        tp_size = self.placement.tp_size
        if tp_size == 1 or self.head is None:
            return 0
        return num_rows * self._head_size * (tp_size if self.placement.is_leading else 1)

    @property
    def _head_size(self) -> int:
        assert self.head is not None
        return self.head.out_features

    def _own_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        assert self.head is not None
        self.head(hidden, out)
        if self.config.logit_softcap:
            out.div_(self.config.logit_softcap).tanh_().mul_(self.config.logit_softcap)

    def activations(self, arena: Arena, num_tokens: int) -> Activations:
        """Take all activations of a forward pass of num_tokens tokens from `arena`."""
        is_adding = all(layer.attention.is_adding and layer.mlp.is_adding for layer in self.layers)
        hidden, residual, output = (
            arena.take(length, self.config.hidden_size, dtype=self.dtype)
            for length in (num_tokens, num_tokens, 0 if is_adding else num_tokens)
        )
        squares = None
        if all(layer.has_norm_factors for layer in self.layers):
            width = ops.num_squares(self.config.hidden_size)
            # Taken for every step size, so that the planner sees it in the largest step's as well.
            num_rows = min(num_tokens, ops.MAX_NORM_ROWS)
            room = arena.take(num_rows, width, dtype=torch.float32)
            if num_tokens <= self._max_norm_rows:
                squares = room
        shrunk = self._room_for_adapters(arena, num_tokens)
        by_sizes: dict[tuple[int, ...], LayerActivations] = {}  # shared by layers of equal sizes
        layers = []
        for layer in self.layers:
            sizes = (*layer.attention.sizes, *layer.mlp.sizes)
            if sizes not in by_sizes:
                with arena.reused():
                    attention = layer.attention.activations(arena, num_tokens)
                with arena.reused():
                    mlp = layer.mlp.activations(arena, num_tokens)
                by_sizes[sizes] = attention, mlp
            layers.append(by_sizes[sizes])
        return Activations(hidden, residual, output, squares, layers, shrunk)

    def _room_for_adapters(self, arena: Arena, num_tokens: int) -> dict[int, torch.Tensor]:
        """Activations.shrunk. All Linears share the memory, as they run one after the other."""
        if not self._adapters:
            return {}
        all_parts = {adapters.num_parts for adapters in self._adapters}
        most, size = max(all_parts), self.max_adapter_rank
        rows = lora.most_rows(num_tokens)  # the most on any device, so the planner's size fits
        room = arena.take(rows, most, size, dtype=torch.float32)
        num_splits = lora.num_splits(num_tokens, self.device)
        splits = room[: num_splits * num_tokens].view(num_splits, num_tokens, most, size)
        return {num_parts: splits[:, :, :num_parts] for num_parts in all_parts}

    def adapter_targets(self) -> dict[str, Target]:
        """The modules that an adapter may change, by name; {} without adapter slots."""
        targets: dict[str, Target] = {}
        for adapters in self._adapters:
            targets |= adapters.targets()
        return targets

    def put_adapter(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter, of rank max_adapter_rank at most, into `slot`, which no running step
        uses."""
        for adapters in self._adapters:
            adapters.put(slot, weights.pairs)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapter slots."""
        return sum(adapters.nbytes for adapters in self._adapters)

    def attention_plans(
        self, max_num_tokens: int, max_num_rows: int
    ) -> dict[int, ops.AttentionPlan]:
        """Allocate the attention plans of steps of up to that size: window -> plan. On a card."""
        return {
            window: attention_plan.allocate(
                max_num_tokens, max_num_rows, num_heads=num_heads, num_kv_heads=num_kv_heads,
                head_dim=head_dim, device=self.device,
            )
            for window, (num_heads, num_kv_heads, head_dim) in self._sizes_by_window.items()
        }  # fmt: skip

    def layer_linears(self) -> list[Linear]:
        """The Linears whose matrices every step reads: all but the head and routed experts."""
        return [linear for layer in self.layers for linear in layer.linears]

    def mixtures(self) -> list[Experts]:
        """The mixtures of experts among the layers' MLPs."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]

    def bytes_per_position(self) -> int:
        """Bytes that each position of max_model_len takes in the rope tables."""
        tables = {id(layer.attention.cos_sin): layer.attention.cos_sin for layer in self.layers}
        num_scales = len(
            {rope for layer in self._described if (rope := layer.attention.rope).query_beta}
        )
        return sum(table.nbytes // len(table) for table in tables.values()) + 4 * num_scales

    def kv_specs(self) -> list[KVSpec]:
        """The KVSpec of each layer of this rank."""
        return [layer.attention.kv_spec() for layer in self.layers]

    def destinations(self) -> Destinations:
        """Where each tensor of the checkpoint goes, by its name there; a tied head has none."""
        destinations = self.embedding.destinations()
        for layer in self.layers:
            destinations |= layer.destinations()
        destinations |= self.norm.destinations()
        if self.head is not None:
            destinations |= self.head.destinations()
        if self.pooler is not None and self.placement.has_ends:
            is_tied = self.config.tie_word_embeddings
            embedding = self.embedding.destinations() if is_tied else {}
            destinations |= self.pooler.destinations(embedding, vocab_size=self.config.vocab_size)
        return destinations
