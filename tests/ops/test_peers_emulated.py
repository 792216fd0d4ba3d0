"""The kernels between ranks, their source compiled for a CPU: emulated_peers.h says how they run
there. No data is lost, late, torn or of an earlier round, whoever is ahead."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.ops import emulated

KERNELS = (
    "layers/norm.h",
    "comm/comm.h",
    "layers/norm_row.cuh",
    "comm/wait.cuh",
    "comm/one_shot.cuh",
    "comm/two_shot.cuh",
    "comm/rows.cuh",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated.build(tmp_path_factory.mktemp("peers"), "peers", KERNELS)


def run(program: Path, fault: int, num_steps: int) -> subprocess.CompletedProcess[str]:
    command = [str(program), str(fault), str(num_steps)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_ranks_that_are_not_in_step_get_what_each_has_sent(program: Path) -> None:
    done = run(program, 0, 24)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("fault", [1, 2], ids=["flags come early", "clears are lost"])
def test_a_card_that_breaks_its_promise_is_found_out(program: Path, fault: int) -> None:
    done = run(program, fault, 24)
    assert done.returncode == 1 and "wrong" in done.stdout, done.stdout + done.stderr
