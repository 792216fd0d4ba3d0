"""Progress on a terminal and off it; the file that says ready."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import select
from pathlib import Path

import pytest

from pyserve import log
from pyserve.api.life import progress
from pyserve.api.life.progress import CLEAR_LINE, Shown, describe, show_progress
from pyserve.api.life.ready_file import ReadyFile
from pyserve.api.life.startup import Phase, Startup
from pyserve.errors import StartupError
from pyserve.log import get_logger


def draw(phase: Phase, now_s: float) -> str:
    return Shown(phase.progress, describe(phase, now_s)).with_bar()


def test_a_phase_in_words() -> None:
    phase = Phase("load", 1_000_000_000, 4_000_000_000, 100.0)
    assert describe(phase, 102.0) == "load: 1.00 of 4.00 GB (25%), 500 MB/s, 6 s left"
    assert draw(phase, 102.0).startswith("[########......................] load: ")
    assert describe(Phase("build", 0, 1, 100.0), 112.4) == "build: 12 s so far"
    assert draw(Phase("start", 0, 0, 100.0), 101.0) == f"[{'.' * 30}] start: 1 s so far"
    assert describe(Phase("load", 0, 4_000_000_000, 100.0), 102.0) == "load: 0.00 of 4.00 GB (0%)"
    assert describe(Phase("download", 0, 0, 100.0), 102.0) == "download: 2 s so far"


def test_a_compile_is_told_in_shares_and_seconds() -> None:
    phase = Phase("build", 15_000, 60_000, 100.0, counted_s=105.0)
    assert describe(phase, 120.0) == "build: 25%, 45 s left"
    assert draw(phase, 120.0).startswith("[########......................] build: 25%")


async def _run_for(startup: Startup, seconds: float, line: str = "") -> None:
    task = asyncio.create_task(show_progress(startup))
    await asyncio.sleep(seconds)
    if line:
        get_logger().warning(line)
        await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.wait([task])


def test_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.05)
    caplog.set_level(logging.INFO, "pyserve")
    startup = Startup()
    startup.report("load", 2 * 10**9, 4 * 10**9)
    asyncio.run(_run_for(startup, 0.3))
    lines = [r.message for r in caplog.records if r.message.startswith("load: 2.00 of 4.00 GB")]
    assert 1 <= len(lines) <= 6


def test_a_bar_on_a_terminal_gives_way_to_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr(progress, "BAR_INTERVAL_S", 0.01)
        before = logging.getLogger().handlers[:]
        log.setup("info")
        try:
            startup = Startup()
            startup.report("load", 10**9, 4 * 10**9)
            asyncio.run(_run_for(startup, 0.2, "a line"))
        finally:
            log.flush()
            logging.getLogger().handlers[:] = before
        drawn = ""  # a terminal hands out what it has by and by
        while select.select([reader], [], [], 0.5)[0]:
            drawn += os.read(reader, 65536).decode()
    os.close(reader)
    assert drawn.count("load: 1.00 of 4.00 GB (25%)") >= 3
    assert re.search(re.escape(CLEAR_LINE) + r"\d\d:\d\d:\d\d WARNING a line\r\n", drawn)
    assert drawn.endswith(CLEAR_LINE)
    assert get_logger().handlers == []


def test_the_ready_file_is_whole_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.write_text("stale")
    file = ReadyFile(path)
    assert not path.exists()
    file.write(url="http://x:1", model="m")
    assert json.loads(path.read_text()) == {"url": "http://x:1", "model": "m", "pid": os.getpid()}
    assert list(tmp_path.iterdir()) == [path]
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []
    ReadyFile(None).write(url="", model="")


@pytest.mark.parametrize("where", ["missing/ready", "."])
def test_a_place_that_takes_no_file_is_a_start_error(tmp_path: Path, where: str) -> None:
    with pytest.raises(StartupError, match="--ready-file"):
        ReadyFile(tmp_path / where)
