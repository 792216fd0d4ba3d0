"""The ops of a mixture of experts, for bench.ops and bench.gpu_ops: what is measured, its bytes.

Tokens are random, and go where their router sends them; each set has tokens of its own, so that the
experts that are read are others each time. Bytes are those of the experts that have any row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_chains import Chain
from bench.w4a16 import random_packed
from pyserve.ops import experts, quantised, reference
from pyserve.ops.experts import Routing, Rule

NUM_SETS = 8
RULE = Rule()


@dataclass(frozen=True, slots=True)
class Layer:
    """Sizes of a mixture; `tokens` are how many of them are measured at once."""

    hidden: int
    size: int
    num_experts: int
    top_k: int
    tokens: tuple[int, ...]


LAYERS = {
    "8x7b": Layer(4096, 14336, 8, 2, (1, 8, 16, 32, 64, 256, 1024, 8192)),
    "30b-a3b": Layer(2048, 768, 128, 8, (1, 8, 16, 32, 64, 256, 1024, 8192)),
}
# One token for each expert of 8x7b, so that all are read: percent of what a copy moves.
ALL_READ, ALL_READ_TARGET = "8x7b", ("%", 85.0)


class Mixture:
    """The weights of a layer, and room for what its ops make."""

    def __init__(
        self, layer: Layer, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device=device)

        self.layer, self.num_tokens = layer, num_tokens
        num_rows = num_tokens * layer.top_k
        self.router = torch.randn(layer.num_experts, layer.hidden, device=device).to(dtype)
        self.activated = empty(num_rows, layer.size).normal_()
        self.rows = empty(num_rows, layer.hidden).normal_()
        self.out = empty(num_tokens, layer.hidden).zero_()
        self.slots = torch.arange(num_tokens, device=device)
        self.gate_up = self.matrices(2 * layer.size, layer.hidden)
        self.down = self.matrices(layer.hidden, layer.size)

    def matrices(self, n: int, k: int) -> Tensor:
        """Of all experts."""
        return self.out.new_empty(self.layer.num_experts, n, k).normal_(0, 0.02)

    def tokens(self) -> Tensor:
        return torch.randn_like(self.out)

    def routing(self, x: Tensor) -> Routing:
        layer, n = self.layer, self.num_tokens

        def empty(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=of, device=x.device)

        routing = Routing(
            empty(n, layer.num_experts, of=torch.float32), empty(n, layer.top_k, of=torch.float32),
            empty(n, layer.top_k), empty(n * layer.top_k), empty(layer.num_experts + 1),
        )  # fmt: skip
        self.route(x, routing)
        return routing

    def one_token_each(self, x: Tensor) -> Routing:
        """Of as many tokens as there are experts, for products alone."""
        routing = self.routing(x)
        routing.offsets.copy_(torch.arange(self.layer.num_experts + 1))
        return routing

    def route(self, x: Tensor, routing: Routing) -> None:
        experts.route(x, self.router, None, self.slots, RULE, routing)

    def first(self, x: Tensor, routing: Routing) -> None:
        experts.grouped_linear_silu_mul(x, self.gate_up, routing, self.activated, self.rows)

    def second(self, routing: Routing) -> None:
        experts.grouped_linear(self.activated, self.down, routing, self.rows)

    def combine(self, routing: Routing) -> None:
        experts.combine_experts(self.rows, routing, None, self.out, is_adding=True)

    def all_of_it(self, x: Tensor, routing: Routing) -> None:
        self.route(x, routing)
        self.first(x, routing)
        self.second(routing)
        self.combine(routing)

    def bytes_read(self, routing: Routing) -> tuple[int, int]:
        """Of gate_up and of down."""
        share = int((routing.offsets.diff() > 0).sum())
        first, second = (it.nbytes // self.layer.num_experts for it in (self.gate_up, self.down))
        return first * share, second * share


class IntegerMixture(Mixture):
    """With experts of 4-bit integers."""

    def matrices(self, n: int, k: int) -> Tensor:
        """Packed."""
        each = [random_packed(n, k, self.slots.device) for _ in range(self.layer.num_experts)]
        return torch.stack(each)

    def first(self, x: Tensor, routing: Routing) -> None:
        quantised.grouped_linear_silu_mul(
            x, quantised.W4A16Matrix(self.gate_up), routing, self.activated, self.rows,
            x.new_empty(32 * x.shape[1]),
        )  # fmt: skip

    def second(self, routing: Routing) -> None:
        x, matrix = self.activated, quantised.W4A16Matrix(self.down)
        quantised.grouped_linear(x, matrix, routing, self.rows, x.new_empty(16 * x.shape[1]))


def _sizes(mixture: Mixture, routing: Routing) -> dict[str, tuple[int, int]]:
    """(bytes, operations) of each op, by its name."""
    layer, n = mixture.layer, mixture.num_tokens
    first, second = mixture.bytes_read(routing)
    element = mixture.out.element_size()
    row, size = layer.hidden * element, layer.size * element
    num_rows, flops = n * layer.top_k, 2 * n * layer.top_k * layer.size * layer.hidden
    sizes = {
        "route": (mixture.router.nbytes + n * row, 2 * n * layer.num_experts * layer.hidden),
        "grouped_linear_silu_mul": (first + n * row + num_rows * size, 2 * flops),
        "grouped_linear": (second + num_rows * (row + size), flops),
        "combine_experts": ((num_rows + 2 * n) * row, 0),
    }
    return sizes | {"experts": (first + second + mixture.router.nbytes, 3 * flops)}


def chains(device: torch.device) -> Iterator[Chain]:
    """Each op alone, and all of them one after another as a layer has them."""
    for name, layer in LAYERS.items():
        for num_tokens in layer.tokens:
            mixture = Mixture(layer, num_tokens, torch.bfloat16, device)
            sets = [(x, mixture.routing(x)) for x in (mixture.tokens() for _ in range(NUM_SETS))]
            sizes = _sizes(mixture, sets[0][1])
            runs: dict[str, list[Callable[[], object]]] = {
                "route": [partial(mixture.route, *it) for it in sets],
                "grouped_linear_silu_mul": [partial(mixture.first, *it) for it in sets],
                "grouped_linear": [partial(mixture.second, routing) for _, routing in sets],
                "combine_experts": [partial(mixture.combine, routing) for _, routing in sets],
                "experts": [partial(mixture.all_of_it, *it) for it in sets],
            }
            for op, of_op in runs.items():
                yield Chain(op, f"{num_tokens} tokens, {name}", of_op, *sizes[op])
            del mixture, sets, runs
    yield from _all_read(device)


def integer_chains(device: torch.device) -> Iterator[Chain]:
    """The products alone, by 4-bit integers, and both with what stands around them."""
    for name, layer in LAYERS.items():
        for num_tokens in layer.tokens:
            mixture = IntegerMixture(layer, num_tokens, torch.bfloat16, device)
            sets = [(x, mixture.routing(x)) for x in (mixture.tokens() for _ in range(NUM_SETS))]
            sizes = _sizes(mixture, sets[0][1])
            load = f"{num_tokens} tokens, {name}"
            runs: list[Callable[[], object]] = [partial(mixture.first, *it) for it in sets]
            size = sizes["grouped_linear_silu_mul"]
            yield Chain("grouped_linear_w4a16", f"{load}: gate_up", runs, *size)
            runs = [partial(mixture.second, routing) for _, routing in sets]
            yield Chain("grouped_linear_w4a16", f"{load}: down", runs, *sizes["grouped_linear"])
            runs = [partial(mixture.all_of_it, *it) for it in sets]
            yield Chain("int4 experts", load, runs, *sizes["experts"])


def _all_read(device: torch.device) -> Iterator[Chain]:
    layer = LAYERS[ALL_READ]
    mixture = Mixture(layer, layer.num_experts, torch.bfloat16, device)
    x = mixture.tokens()
    routing = mixture.one_token_each(x)
    sizes = _sizes(mixture, routing)
    for op, run in (
        ("grouped_linear_silu_mul", partial(mixture.first, x, routing)),
        ("grouped_linear", partial(mixture.second, routing)),
    ):
        load = f"{layer.num_experts} experts, a token each, {ALL_READ}"
        yield Chain(op, load, [run], *sizes[op], ALL_READ_TARGET)


def cpu_cases(
    hidden: int, size: int, num_tokens: int, dtype: torch.dtype
) -> Iterator[tuple[Any, ...]]:
    """(op, load, run, twin, bytes, operations, dtype) of a mixture of 8 experts, 2 a token, that is
    as large as a gated MLP of the model in all."""
    layer = Layer(hidden, max(8, size // 8), 8, 2, ())
    mixture = Mixture(layer, num_tokens, dtype, torch.device("cpu"))
    x = mixture.tokens()
    routing = mixture.routing(x)
    load = f"{num_tokens} x {hidden}, 2 of 8 x {layer.size}"
    twins: dict[str, Callable[[], object]] = {
        "route": partial(
            reference.route, x, mixture.router, None, mixture.slots, RULE.is_sigmoid,
            RULE.is_normalized, RULE.scale, RULE.num_groups, RULE.top_groups, *routing,
        ),
        "grouped_linear_silu_mul": partial(
            reference.grouped_linear_silu_mul, x, mixture.gate_up, routing.order, routing.offsets,
            mixture.rows, mixture.activated,
        ),
        "grouped_linear": partial(
            reference.grouped_linear, mixture.activated, mixture.down, routing.offsets, num_tokens,
            mixture.rows,
        ),
        "combine_experts": partial(
            reference.combine_experts, mixture.rows, routing.places, routing.weights, None, True,
            mixture.out,
        ),
    }  # fmt: skip
    runs: dict[str, Callable[[], object]] = {
        "route": partial(mixture.route, x, routing),
        "grouped_linear_silu_mul": partial(mixture.first, x, routing),
        "grouped_linear": partial(mixture.second, routing),
        "combine_experts": partial(mixture.combine, routing),
    }
    sizes = _sizes(mixture, routing)
    for op, run in runs.items():
        yield op, load, run, twins[op], *sizes[op], dtype
