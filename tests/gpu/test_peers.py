"""The ops between ranks, each rank a process: peer_ranks.py has what they do.

With one card the ranks share it in turns, milliseconds each, which shows that they are right; with
two they run at the same time, as they serve.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu.peer_ranks import TESTS

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 90.0


def run_ranks(name: str, tp_size: int, meeting: Path) -> None:
    """A process a rank; all of them end here, and must have ended well."""
    command = [sys.executable, "-m", "tests.gpu.peer_ranks", name]
    processes = [
        subprocess.Popen(
            [*command, str(tp_rank), str(tp_size), str(meeting)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        for tp_rank in range(tp_size)
    ]
    deadline = time.monotonic() + LIMIT_S
    outputs = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            outputs.append(output)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for tp_rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {tp_rank}: {output[-3000:]}"


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.timeout(120)
def test_two_ranks(name: str, tmp_path: Path) -> None:
    run_ranks(name, 2, tmp_path / "meeting")


@pytest.mark.parametrize("tp_size", [4, 8])
@pytest.mark.parametrize("name", ["test_sums", "test_sums_with_norm", "test_graph"])
@pytest.mark.timeout(120)
def test_more_ranks(name: str, tp_size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < tp_size:
        pytest.skip(f"fewer than {tp_size} cards")
    run_ranks(name, tp_size, tmp_path / "meeting")
