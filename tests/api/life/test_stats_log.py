"""The statistics line: what it says, and that an idle server says nothing."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import cast

import pytest

from pyserve.api.life.stats_log import log_statistics
from pyserve.client import EngineClient, EngineInfo, EngineStats
from pyserve.metrics import Metrics

INFO = EngineInfo(
    max_model_len=64, vocab_size=9, max_num_seqs=8, block_size=16, num_blocks=200,
    dtype="float32", device="cpu",
)  # fmt: skip
IDLE = EngineStats(
    num_running=0, num_waiting=0, num_blocks_used=0, num_preemptions=0, num_steps=5,
    prompt_tokens=1000, cached_tokens=100, output_tokens=300, step_age_s=0.0, error=None,
)  # fmt: skip
INTERVAL_S = 0.02


class Engine:
    info = INFO

    def __init__(self, *readings: EngineStats) -> None:
        self.readings = list(readings)

    def stats(self) -> EngineStats:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def lines(caplog: pytest.LogCaptureFixture, engine: Engine, metrics: Metrics) -> list[str]:
    async def run() -> None:
        task = asyncio.create_task(
            log_statistics(cast(EngineClient, engine), metrics, interval_s=INTERVAL_S)
        )
        await asyncio.sleep(0)
        metrics.num_responses[429] += 3
        await asyncio.sleep(4 * INTERVAL_S)
        task.cancel()

    caplog.set_level(logging.INFO, "pyserve")
    asyncio.run(run())
    return caplog.messages


def test_the_line_holds_what_has_happened_since_the_last(caplog: pytest.LogCaptureFixture) -> None:
    busy = replace(
        IDLE, num_running=7, num_waiting=2, num_blocks_used=25, num_steps=9, prompt_tokens=1040,
        cached_tokens=110, output_tokens=301,
    )  # fmt: skip
    assert lines(caplog, Engine(IDLE, busy), Metrics("m")) == [
        "Avg prompt throughput: 2000.0 tokens/s, Avg generation throughput: 50.0 tokens/s, "
        "Running: 7 reqs, Waiting: 2 reqs, GPU KV cache usage: 12.5%, "
        "Prefix cache hit rate: 25.0%, Refused: 3 reqs"
    ]


def test_refusals_alone_are_worth_a_line_and_idling_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (line,) = lines(caplog, Engine(IDLE), Metrics("m"))
    assert line.startswith("Avg prompt throughput: 0.0 tokens/s")
    assert line.endswith("Prefix cache hit rate: 0.0%, Refused: 3 reqs")
