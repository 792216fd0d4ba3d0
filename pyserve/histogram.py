"""Histogram: counts observations of the engine and the API for /metrics. Not thread-safe.

It is cheaper than prometheus_client's, which takes 0.8 us per observation. The engine observes once
per step and never once per token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

# vLLM's bucket bounds, so that its dashboards and alerts mean the same here.
FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_TOKEN_BUCKETS = (
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
)  # fmt: skip
CHOICE_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)
STEP_BUCKETS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0,
    2.5, 5.0, 10.0,
)  # fmt: skip
# Bucket bounds of prometheus-fastapi-instrumentator, whose names the HTTP metrics have.
HTTP_BUCKETS_S = (0.1, 0.5, 1.0)
HTTP_FINE_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0,
    7.5, 10.0, 30.0, 60.0,
)  # fmt: skip


def token_buckets(max_tokens: int) -> tuple[float, ...]:
    """Bucket bounds for numbers of tokens: 1, 2, 5, 10, 20, 50, ... up to `max_tokens`."""
    bounds = [float(digit * 10**power) for power in range(8) for digit in (1, 2, 5)]
    return tuple(bound for bound in bounds if bound <= max_tokens)


class Histogram:
    """Observations per bucket, and their sum. Buckets are made cumulative only when shown.

    bounds  upper bounds of the buckets, ascending; a last bucket without a bound follows.
    counts  observations in each bucket.
    total   sum of all observed values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        """Number of observations so far."""
        return sum(self.counts)

    def observe(self, value: float, count: int = 1) -> None:
        """Note `count` observations of `value`."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it) of every bucket, ending with "+Inf"."""
        buckets = []
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            buckets.append((bound, float(seen)))
        return buckets


@dataclass(slots=True, eq=False)
class StepHistograms:
    """What the engine observes once per step.

    num_tokens     number of tokens that the step ran, prompt and output together.
    duration_s     seconds from its launch, or the end of the step before it, to its result.
    inter_token_s  seconds from one output token of a sequence to the next.
    """

    num_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKEN_BUCKETS))
    duration_s: Histogram = field(default_factory=lambda: Histogram(STEP_BUCKETS_S))
    inter_token_s: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_BUCKETS_S))
