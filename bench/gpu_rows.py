"""Who multiplies a few rows of an 8B layer fastest: our kernels or cuBLAS.

`python -m bench.ops --device cuda --only few_rows` measures it, in graphs of chained launches over
weights that L2 does not hold, and prints the fastest by rows: each matrix with its epilogue, and
the layer's four with what stands between them, norms and activations, as a step has them. Ours are
few_rows.cuh, for up to 32 rows, whether or not a step would take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu_chains import EPS, Chain, Shape, Step
from pyserve import ops

ROWS = (1, 4, 8, 9, 12, 16, 24, 32, 33, 64, 128)
MAX_OWN_ROWS = 32  # in one pass over the weight
CUBLAS = "cuBLAS"
FOLLOWED = " and what follows"


class Layer:
    """One layer's weights, and activations that all layers share."""

    def __init__(self, step: Step, weights: list[Tensor], norm: Tensor, squares: Tensor) -> None:
        self.step, self.norm, self.squares = step, norm, squares
        self.qkv, self.o, self.gate_up, self.down = weights

    def own(self) -> dict[str, Callable[[], object]]:
        """Norms are factors, as in a step: each linear_add leaves what the next linear needs."""
        step, squares = self.step, self.squares

        def add(x: Tensor, weight: Tensor) -> Callable[[], object]:
            return partial(
                ops.linear_add_for_norm, x, weight, None, step.residual, self.norm, step.x, squares
            )

        qkv = partial(ops.linear_of_scaled, step.x, self.qkv, None, step.qkv, squares, EPS)
        gate_up = partial(
            ops.linear_silu_mul_of_scaled, step.x, self.gate_up, None, step.act, squares, EPS
        )
        o, down = add(step.joined, self.o), add(step.act, self.down)
        return with_layer(qkv=[qkv], o=[o], gate_up=[gate_up], down=[down])

    def cublas(self) -> dict[str, Callable[[], object]]:
        step = self.step
        norm = partial(ops.rms_norm, step.residual, self.norm, EPS, step.x)
        linear: Callable[..., Tensor] = functional.linear

        def add(x: Tensor, weight: Tensor) -> Callable[[], object]:
            return partial(step.residual.addmm_, x, weight.t())

        return with_layer(
            qkv=[partial(linear, step.x, self.qkv, out=step.qkv)],
            o=[add(step.joined, self.o), norm],
            gate_up=[
                partial(linear, step.x, self.gate_up, out=step.gate_up),
                partial(ops.silu_mul, step.gate_up, step.act),
            ],
            down=[add(step.act, self.down), norm],
        )


def with_layer(**parts: Sequence[Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Each part as one call, and all of them as `layer`."""

    def call(runs: Sequence[Callable[[], object]]) -> None:
        for run in runs:
            run()

    made: dict[str, Callable[[], object]] = {n: partial(call, runs) for n, runs in parts.items()}
    made["layer"] = partial(call, [run for runs in parts.values() for run in runs])
    return made


def few_row_chains(shape: Shape) -> Iterator[Chain]:
    """A chain for each number of rows, matrix and way to multiply; then the layer's."""
    weights = shape.weights()
    sizes = dict(zip(("qkv", "o", "gate_up", "down"), shape.matrices, strict=True))
    num_weights = {name: n * k for name, (n, k) in sizes.items()} | {"layer": shape.num_weights}
    norm = shape.randn(shape.hidden)
    for num_rows in ROWS:
        step = Step(shape, num_rows, 1)
        squares = torch.ones(num_rows, ops.num_squares(shape.hidden), device=shape.device)
        layers = [Layer(step, each, norm, squares) for each in weights]
        ways = {CUBLAS: [layer.cublas() for layer in layers]}
        if num_rows <= MAX_OWN_ROWS:
            ways["own"] = [layer.own() for layer in layers]
        for part, count in num_weights.items():
            for way, made in ways.items():
                yield Chain(
                    name=way,
                    load=f"{num_rows} rows, {part}{FOLLOWED}",
                    runs=[runs[part] for runs in made],
                    num_bytes=2 * count,
                    num_flops=2 * num_rows * count,
                )


def print_winners(results: Sequence[dict[str, Any]]) -> None:
    """One line for each number of rows: us of the fastest way and of cuBLAS, by matrix."""
    lines: dict[str, list[str]] = {}
    by_load: dict[str, dict[str, float]] = {}
    for result in results:
        if "us" in result and result["load"].endswith(FOLLOWED):
            by_load.setdefault(result["load"], {})[result["op"]] = result["us"]
    for load, times in by_load.items():
        rows, _, part = load.removesuffix(FOLLOWED).partition(", ")
        best = min(times, key=lambda way: times[way])
        words = f"{part} {best} {times[best]:.1f} ({times.get(CUBLAS, 0.0):.1f})"
        lines.setdefault(rows, []).append(words)
    for rows, parts in lines.items():
        print(f"= {rows}, us, fastest (cuBLAS): {'; '.join(parts)}")


def print_crossing(
    results: Sequence[dict[str, Any]], names: Iterable[str], own_op: str, other_op: str
) -> None:
    """One line a matrix: us of our op over those of the other way, by rows."""
    own = {r["load"]: r["us"] for r in results if r["op"] == own_op and "us" in r}
    other = {r["load"]: r["us"] for r in results if r["op"] == other_op and "us" in r}
    for name in names:
        pairs = [
            f"{load.split()[0]}: {own[load]:.1f}/{other[load]:.1f}"
            for load in own
            if load.endswith(f"({name})") and load in other
        ]
        if pairs:
            print(f"= {own_op} {name}, us of ours / {other_op} by rows: {', '.join(pairs)}")
