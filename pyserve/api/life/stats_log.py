"""Logs a line of statistics every ten seconds in which the server had something to do.

Up to the hit rate its wording is vLLM's, because scripts parse it.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from pyserve.client import EngineClient, EngineStats
from pyserve.log import get_logger
from pyserve.metrics import Metrics

INTERVAL_S = 10.0


class _Reading(NamedTuple):
    stats: EngineStats
    num_refused: int  # responses with status 429


async def log_statistics(
    engine: EngineClient, metrics: Metrics, interval_s: float = INTERVAL_S
) -> None:
    """Log the statistics of each interval with any work in it, until this is cancelled."""
    last = _read(engine, metrics)
    while True:
        await asyncio.sleep(interval_s)
        now = _read(engine, metrics)
        if now.stats.num_steps != last.stats.num_steps or now.num_refused != last.num_refused:
            get_logger().info("%s", _describe(last, now, engine.info.num_blocks, interval_s))
        last = now


def _read(engine: EngineClient, metrics: Metrics) -> _Reading:
    return _Reading(engine.stats(), metrics.num_responses[429])


def _describe(last: _Reading, now: _Reading, num_blocks: int, interval_s: float) -> str:
    stats = now.stats
    prompt_tokens = stats.prompt_tokens - last.stats.prompt_tokens
    cached_tokens = stats.cached_tokens - last.stats.cached_tokens
    output_tokens = stats.output_tokens - last.stats.output_tokens
    return (
        f"Avg prompt throughput: {prompt_tokens / interval_s:.1f} tokens/s, "
        f"Avg generation throughput: {output_tokens / interval_s:.1f} tokens/s, "
        f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
        f"GPU KV cache usage: {stats.num_blocks_used / num_blocks:.1%}, "
        f"Prefix cache hit rate: {cached_tokens / prompt_tokens if prompt_tokens else 0.0:.1%}, "
        f"Refused: {now.num_refused - last.num_refused} reqs"
    )
