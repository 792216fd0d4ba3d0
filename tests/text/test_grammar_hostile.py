"""What is meant to hurt the grammar engine is answered, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NUM_ROUNDS = 7
MAX_COMPILE_S = 5.0
MAX_FILL_S = 1.0
MAX_GROWTH_MIB = 96  # what the allocator keeps of the largest of them moves up and down by half


def test_hostile_specs_are_answered_and_forgotten() -> None:
    """In a process of its own, which must not die."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.text.hostile_grammars", str(NUM_ROUNDS), "uncached"],
        capture_output=True, text=True, timeout=250, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout)
    assert told["slowest_s"][0] < MAX_COMPILE_S, told["slowest_s"]
    assert told["slowest_fill_s"][0] < MAX_FILL_S, told["slowest_fill_s"]
    assert told["compiled"] > 100 and told["refused"] > 100, told
    assert told["mib"][-1] < told["mib"][2] + MAX_GROWTH_MIB, told["mib"]
