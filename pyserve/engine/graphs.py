"""CUDA graphs: kernel launches that are recorded once and then cheap for the host to replay.

A step is two launches, forward and sampling (executor.py), and each is recorded for the padded
shapes of small steps before the server is ready. While serving, a launch is replayed if its shape
has a graph, and otherwise run op by op. Only the executor knows the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress

import torch

from pyserve.engine.batch import padded_sizes

MAX_GRAPH_TOKENS = 1024  # larger steps run longer than their launch takes, so graphs gain nothing
# Device memory that a graph takes for each kernel launch in it. Measured on an H200: 60 MiB for
# graphs of 37 forward passes of 32 layers and 16 samplings.
NODE_BYTES = 4800
NODES_PER_LAYER = 10  # kernel launches of one layer
ADAPTER_NODES_PER_LAYER = 18  # further launches in the graphs with adapters: two for each Linear


def graph_sizes(max_num_tokens: int) -> list[int]:
    """The padded step sizes, in tokens, that get a CUDA graph; the smallest first."""
    return [size for size in padded_sizes(max_num_tokens) if size <= MAX_GRAPH_TOKENS]


def graphs_bytes(
    num_layers: int, *, max_num_tokens: int, num_slots: int, has_adapters: bool = False
) -> int:
    """An estimate of the device memory in bytes that the graphs of all shapes take."""
    nodes_per_layer = NODES_PER_LAYER + (ADAPTER_NODES_PER_LAYER if has_adapters else 0)
    num_nodes = 2 * len(graph_sizes(max_num_tokens)) * (num_layers + 1) * nodes_per_layer
    return NODE_BYTES * (num_nodes + NODES_PER_LAYER * len(padded_sizes(num_slots)))


class GraphCache:
    """Recorded launches by key; all graphs share one memory pool.

    A graph replays with fixed addresses. That is right here because the tensors that a launch is
    given are allocated once, and the tensors that it creates itself belong to the graph's pool.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def record(self, key: Hashable, launch: Callable[[], object]) -> None:
        """Record `launch` under `key` without executing it.

        The current stream must not be the default one, and `launch` must have run on it before, so
        that whatever a first call loads or allocates is there already.
        """
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may keep calling CUDA, as they do not use this stream.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            launch()
        except BaseException:
            # The failure may have invalidated the capture; ending it would raise an error that
            # says only that and hides the cause.
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> bool:
        """Launch the graph of `key` on the current stream; False where there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def clear(self) -> None:
        """Free all graphs; none of them may be running."""
        self._graphs.clear()


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous tensors are equal bit by bit.

    Unlike with ==, a NaN equals itself; some models compute NaNs in float16.
    """
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
