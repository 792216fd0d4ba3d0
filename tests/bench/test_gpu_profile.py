"""bench.gpu_profile: its loads and its table, of events that no card has made."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu_profile


def test_loads() -> None:
    assert gpu_profile.Load.parse("64x384") == (64, 384, False)
    assert gpu_profile.Load.parse("1x8192p") == (1, 8192, True)
    with pytest.raises(argparse.ArgumentTypeError, match="ROWSxCONTEXT or ROWSxCONTEXTp, got 64"):
        gpu_profile.Load.parse("64")


def test_the_table_counts_what_overlaps_once() -> None:
    def event(name: str, start: float, end: float, device: str = "CUDA") -> Any:
        return SimpleNamespace(
            name=name,
            device_type=SimpleNamespace(name=device),
            time_range=SimpleNamespace(start=start, end=end),
        )

    events = [
        event("void pyserve::gpu::(anonymous namespace)::linear_kernel<1>(Params)", 0, 4000),
        event("void pyserve::gpu::(anonymous namespace)::linear_kernel<1>(Params)", 3000, 6000),
        event("nvjet_tst", 8000, 10000),
        event("cudaLaunchKernel", 0, 20000, "CPU"),
    ]
    seen: Any = SimpleNamespace(events=lambda: events)
    head, *rows = gpu_profile.format_times(
        gpu_profile.Load(2, 384, False), seen, num_steps=2
    ).splitlines()
    assert head == "= 2 x 384 decoding: 5.00 ms a step from first to last kernel, 4.00 busy"
    assert [row.split() for row in rows] == [
        ["3500.0", "us", "1.0", "x", "3500.00", "linear_kernel<1>"],
        ["1000.0", "us", "0.5", "x", "2000.00", "nvjet_tst"],
    ]
