"""On demand: 10,000 lines by the demo model, killed ten times; pytest tests/e2e/killed_batch.py."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NUM_LINES, NUM_KILLS = 10_000, 10
START_S = 300.0  # of one run, until so much is done or it has gone
END_S = 1800.0  # of the last run, which does the rest


def num_kept(partial: Path) -> int:
    return partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0


@pytest.mark.timeout(3600)
def test_each_custom_id_is_answered_once(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    rng = random.Random(1)
    with source.open("w") as file:
        for number in range(NUM_LINES):
            body = {"prompt": f"Line {number}", "max_tokens": rng.randint(1, 16)}
            request = {"custom_id": f"r-{number}", "url": "/v1/completions", "body": body}
            file.write(json.dumps(request) + "\n")
    command = [sys.executable, "-m", "pyserve", "run-batch", "--device", "cpu"]
    command += ["-i", str(source), "-o", str(target)]
    for kill in range(NUM_KILLS):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
        wanted = (kill + 1) * NUM_LINES // (NUM_KILLS + 1)
        deadline = time.monotonic() + START_S
        while num_kept(partial) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(rng.uniform(0.001, 0.1))
        assert process.poll() is None, "it was killed while it ran"
        process.kill()
        process.wait(START_S)
    assert not target.exists()
    done = subprocess.run(command, stderr=subprocess.DEVNULL, cwd=ROOT, timeout=END_S)
    assert done.returncode == 0
    with target.open() as file:
        ids = [json.loads(line)["custom_id"] for line in file]
    assert ids == [f"r-{number}" for number in range(NUM_LINES)]
    assert not partial.exists()
