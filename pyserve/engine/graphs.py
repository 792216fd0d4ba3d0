"""CUDA graphs: launches that were recorded once and cost the host next to nothing to repeat.

A step is two launches (runner.py), and each is recorded for the padded shapes that come often. All
of it happens before the server is ready: after it a launch is replayed where its shape has a graph,
and run call by call where it has none. Nothing else knows the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress

import torch

from pyserve.engine.batch import padded_sizes

MAX_GRAPH_TOKENS = 1024  # of a recorded step: a larger one takes longer than its launch
# Of device memory for each launch of a kernel: 60 MiB for 37 forward passes of 32 layers and 16
# samplings on an H200.
NODE_BYTES = 4800
NODES_PER_LAYER = 10
ADAPTER_NODES_PER_LAYER = 18  # in records of their own: two more for each Linear


def graph_sizes(max_num_tokens: int) -> list[int]:
    """Padded numbers of tokens whose steps are recorded, the smallest first."""
    return [size for size in padded_sizes(max_num_tokens) if size <= MAX_GRAPH_TOKENS]


def graphs_bytes(
    num_layers: int, *, max_num_tokens: int, num_slots: int, has_adapters: bool = False
) -> int:
    """What the records of all shapes take on the card."""
    nodes_per_layer = NODES_PER_LAYER + (ADAPTER_NODES_PER_LAYER if has_adapters else 0)
    num_nodes = 2 * len(graph_sizes(max_num_tokens)) * (num_layers + 1) * nodes_per_layer
    return NODE_BYTES * (num_nodes + NODES_PER_LAYER * len(padded_sizes(num_slots)))


class GraphCache:
    """Recorded launches by key, their memory in one pool.

    What a launch reads and writes has the same addresses each time it is called: the tensors that
    it is given are allocated once, those that it makes itself belong to its graph.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def record(self, key: Hashable, launch: Callable[[], object]) -> None:
        """Record `launch` on the current stream, which is not the default one; it is not executed.

        It has run before on this stream: what is loaded or allocated at a first call is there.
        """
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on calling CUDA: they do not touch this stream.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            launch()
        except BaseException:
            # A launch that failed may have made the capture void, and its end would say only that.
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        self._graphs[key] = graph

    def replay(self, key: Hashable) -> bool:
        """Launch what was recorded under `key`, on the current stream. False where nothing was."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        graph.replay()
        return True

    def clear(self) -> None:
        """Free the graphs; none of them runs."""
        self._graphs.clear()


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of contiguous tensors. A NaN, which some models compute in float16, equals itself here."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
