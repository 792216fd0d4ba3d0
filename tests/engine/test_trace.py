"""--trace: a file that trace viewers open, and what it must never do to a server."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pyserve.client import SequenceRequest
from pyserve.engine import trace as trace_module
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.trace import STEPS, Trace
from pyserve.errors import StartupError
from pyserve.params import SamplingParams
from tests.engine.fake_runner import make_engine
from tests.engine.hard_moments import read_all
from tests.engine.test_async_engine import async_engine


def read(path: Path) -> list[dict[str, Any]]:
    """As viewers do: the closing bracket and the last comma may be missing."""
    events: list[dict[str, Any]] = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    return events


def serve(trace: Trace | None, *, num_tokens: int) -> int:
    """Generate so many tokens; the number of steps."""

    async def test() -> int:
        engine = make_engine()
        info = async_engine(engine, depth=1).info
        client = AsyncEngine(engine, info, trace)
        client.start()
        params = SamplingParams(max_tokens=num_tokens, seed=0)
        await read_all(client.submit(SequenceRequest([1, 2, 3], params)))
        await client.stop()
        return engine.num_steps

    return asyncio.run(asyncio.wait_for(test(), 20))


def test_every_step_is_in_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    num_steps = serve(Trace(path), num_tokens=9)
    events = read(path)
    spans = [event for event in events if event["ph"] == "X"]
    names = [event["name"] for event in spans]
    assert num_steps == 9 == names.count("step") == names.count("launch") == names.count("update")
    assert names.count("schedule") > 9 and "deliver" in names
    assert all(event["dur"] >= 0 for event in spans)
    steps = [event for event in spans if event["name"] == "step"]
    assert {event["tid"] for event in steps} == {STEPS}
    assert steps[0]["args"] == {"num_tokens": 3, "num_rows": 1, "num_prompt_tokens": 3}
    assert steps[1]["args"]["num_prompt_tokens"] == 0
    # Calls of one thread follow one another: no span of the loop overlaps the next.
    loop = sorted((event for event in spans if event["tid"] != STEPS), key=lambda e: e["ts"])
    flat = [event for event in loop if event["name"] in ("schedule", "launch", "update")]
    for before, after in zip(flat, flat[1:], strict=False):
        assert before["ts"] + before["dur"] <= after["ts"] + 1.0  # rounded
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert tracks[STEPS] == "steps on the device" and len(tracks) == 2


def test_without_a_trace_nothing_is_watched() -> None:
    engine = make_engine()
    async_engine(engine)
    assert not {"schedule", "update"} & vars(engine).keys()


def test_a_file_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--trace: cannot write .*: No such file"):
        Trace(tmp_path / "missing" / "trace.json")


def test_a_full_trace_says_so_once_and_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_module, "MAX_BYTES", 4000)
    monkeypatch.setattr(trace_module, "FLUSH_EVENTS", 5)
    path = tmp_path / "trace.json"
    with caplog.at_level(logging.WARNING, "pyserve"):
        assert serve(Trace(path), num_tokens=60) == 60
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the trace ends here: it has reached" in caplog.text
    assert 1000 < path.stat().st_size <= 4000 and read(path)


def test_a_disk_that_is_full_ends_the_trace_alone(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(Path("/dev/full")) if Path("/dev/full").exists() else pytest.skip("no /dev/full")
    assert serve(trace, num_tokens=5) == 5
    assert caplog.text.count("the trace ends here: No space left on device") == 1
