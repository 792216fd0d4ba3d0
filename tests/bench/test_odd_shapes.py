"""bench.odd_shapes on a CPU with a clock of its own: what is expected, and who misses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from bench import gpu_ops, odd_shapes
from bench.gpu_attention import Heads
from bench.gpu_timing import Timing
from pyserve import ops
from pyserve.ops import build


def test_between_neighbours() -> None:
    curves = {1: [(0.0, 2.0), (10.0, 4.0)], 3: [(0.0, 4.0), (10.0, 8.0)]}
    assert odd_shapes.expected_us(curves, 1, 5.0) == 3.0
    assert odd_shapes.expected_us(curves, 2, 5.0) == 4.5
    assert odd_shapes.expected_us(curves, 3, 20.0) == 12.0  # the last line goes on
    assert odd_shapes.on_curve([(1.0, 7.0)], 100.0) == 7.0


def test_the_slow_one_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build.load_native(is_reference_allowed=False, progress=print)
    sizes = {
        "DEVICE": torch.device("cpu"), "TUNED_HEADS": Heads(4, 2, 16),
        "ODD_HEADS": (Heads(6, 2, 16, name="Odd"),), "TUNED_ROWS": (1, 4), "ODD_ROWS": (3,),
        "TUNED_CONTEXTS": (1, 40), "ODD_CONTEXTS": (17,), "TUNED_MATRICES": ((64, 32), (32, 96)),
        "ODD_MATRICES": {"Odd": ((48, 32),)}, "TUNED_BATCHES": (1, 4),
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(odd_shapes, name, value)
    monkeypatch.setattr(gpu_ops, "ROTATED_BYTES", 1)
    monkeypatch.setattr(ops, "plan_attention", lambda *_, **__: None)
    monkeypatch.setattr(ops, "rope_attention", lambda *_, **__: None)
    clock = iter([*[10.0] * 4, 20.0, *[10.0] * 4, 10.0])  # tuned and odd attention, then Linears

    def time_sets(sets: Sequence[Callable[[], object]], seconds: float) -> Timing:
        for run in sets:
            run()
        return Timing(us=next(clock), spread_us=0.1, is_graph=True)

    monkeypatch.setattr(odd_shapes, "time_sets", time_sets)
    attention, linear = odd_shapes.run(0.0)
    assert (attention["share"], linear["share"]) == (0.5, 1.0)
    printed = capsys.readouterr().out
    assert "rope_attention 3 x 17, Odd: 20.0 us, expected 10.0: 0.50 MISSED" in printed
    assert "linear 3 x 32 -> 48, Odd: 10.0 us, expected 10.0: 1.00\n" in printed
    assert "= 1 of 2 shapes at 90% or more" in printed
