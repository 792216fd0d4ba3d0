"""bench.sleep_wake on the demo model, with times of the moment."""

from __future__ import annotations

import re

import pytest

from bench import sleep_wake


def test_a_server_that_sleeps_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--kv-cache-memory-bytes", "64M", "--max-model-len", "512"]
    assert sleep_wake.main(["--times", "1", "--", *flags]) == 0
    figures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("= ")]
    assert len(figures) == 4, figures
    for level, line in zip((1, 2), figures[1:3], strict=True):
        words = rf"= level {level}, 1 times: .*; asleep after [\d.]+ s .*, first token .* [\d.]+ s"
        assert re.match(words, line)
