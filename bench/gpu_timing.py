"""How long calls take on an NVIDIA card, launches not counted where a CUDA graph can hold them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Timing:
    us: float
    spread_us: float
    is_graph: bool  # else: eager calls, launches included


def time_sets(sets: Sequence[Callable[[], object]], seconds: float) -> Timing:
    """Microseconds a call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in sets:
            run()  # handles, modules and attributes are made here, not while capturing
        stream.synchronize()
        start, end = _event(), _event()
        start.record()
        for run in sets:
            run()
        end.record()
        end.synchronize()
        once_us = max(start.elapsed_time(end) * 1e3 / len(sets), 1.0)
    # A graph of a millisecond or more, so that events and its own start do not count.
    calls = [run for run, _ in zip(itertools.cycle(sets), range(_num_calls(len(sets), once_us)))]
    replay, is_graph = _captured(calls, stream)
    times = []
    num_replays = max(7, min(60, int(seconds * 1e6 / (once_us * len(calls)))))
    with torch.cuda.stream(stream):
        for _ in range(2):
            replay()
        events = [(_event(), _event()) for _ in range(num_replays)]
        for start, end in events:
            start.record()
            replay()
            end.record()
        stream.synchronize()
    times = sorted(start.elapsed_time(end) * 1e3 / len(calls) for start, end in events)
    tenth = len(times) // 10
    return Timing(statistics.median(times), (times[-1 - tenth] - times[tenth]) / 2, is_graph)


def _num_calls(num_sets: int, once_us: float) -> int:
    """A multiple of num_sets that takes about 2 ms, of at most 400 calls."""
    rounds = max(1, min(int(2000 / (once_us * num_sets)), 400 // num_sets))
    return rounds * num_sets


def _captured(
    calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream
) -> tuple[Callable[[], object], bool]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for run in calls:
                run()
    except RuntimeError:  # not capturable: a fault of the op, which the table shows
        return (lambda: [run() for run in calls]), False
    return graph.replay, True


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def copy_us(destination: Tensor, source: Tensor, repeats: int = 10) -> float:
    """Not in a graph: there the copy engine does it, at two thirds of the rate of a kernel."""
    times = []
    for _ in range(repeats):
        begin, end = _event(), _event()
        begin.record()
        destination.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)
