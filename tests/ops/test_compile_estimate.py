"""How far a compile is: what is told against compiles whose times are known."""

from __future__ import annotations

import heapq
import random

import pytest

from pyserve.ops import build, nvcc, toolchain
from pyserve.ops.compile_estimate import (
    NUM_LINKS,
    SLOW_FILES_S,
    CompileEstimate,
    expected_seconds,
)


def run(seconds: list[float], num_cores: int) -> list[float]:
    """When each file has ended, in order, where they take so long; the links take nothing."""
    cores, ends = [0.0] * num_cores, []
    for file_s in seconds:
        ends.append(heapq.heappop(cores) + file_s)
        heapq.heappush(cores, ends[-1])
    return sorted(ends) + [max(ends)] * NUM_LINKS


def seconds_left(
    expected: list[float], real: list[float], num_cores: int, num_before: int = 0
) -> list[tuple[float, float, float]]:
    """(time, what is really left, what is told of it), each half second and at each file's end."""
    estimate = CompileEstimate(expected, num_cores)
    ends = run(real, num_cores)
    start_s = ends[num_before - 1] if num_before else 0.0
    told = []
    last_done = -1
    ticks = [tick / 2 for tick in range(1, int(2 * (ends[-1] - start_s)))]
    for now_s in sorted({*ticks, *(end - start_s for end in ends if start_s < end < ends[-1])}):
        num_done = sum(end <= start_s + now_s for end in ends) - num_before
        num_steps = len(ends) - num_before
        done, total = estimate.at(num_done, num_steps, now_s)
        assert 0 < done < total and done >= last_done, "it never goes back"
        last_done = done
        told.append((now_s, ends[-1] - start_s - now_s, now_s * (total - done) / done))
    assert estimate.at(len(ends) - num_before, len(ends) - num_before, 1e3)[0] == total
    return told


@pytest.mark.parametrize("num_cores", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_machine_like_ours_is_told_to_a_tenth(num_cores: int, has_cuda: bool) -> None:
    cuda = nvcc.CudaCompiler("nvcc", (13, 0), ("90a",), (), ())
    files = toolchain.compiled_files(build.source_dir(), cuda if has_cuda else None)
    names = [path.relative_to(build.source_dir()).as_posix() for path in files]
    seconds = expected_seconds(names)
    whole_s = run(seconds, num_cores)[-1]
    for now_s, left_s, told_s in seconds_left(seconds, seconds, num_cores):
        assert told_s == pytest.approx(left_s, abs=0.1 * whole_s + 1.5), now_s


@pytest.mark.parametrize("factor", [0.4, 3.0])
@pytest.mark.parametrize("num_cores", [2, 16])
def test_a_faster_or_slower_machine_is_known_by_its_first_files(
    factor: float, num_cores: int
) -> None:
    slow = ["gpu/sample/sample.cu", "host.cpp"]
    expected = expected_seconds(["gpu/a.cu"] * 8 + slow + ["a.cpp"] * 12)
    noise = random.Random(1)
    real = [factor * second * noise.uniform(0.8, 1.25) for second in expected]
    ends = run(real, num_cores)
    for now_s, left_s, told_s in seconds_left(expected, real, num_cores):
        if now_s > ends[3]:
            assert told_s == pytest.approx(left_s, rel=0.6, abs=0.15 * ends[-1])


def test_a_file_that_runs_alone_at_the_end_is_not_a_small_rest() -> None:
    """By their number 29 of 30 files are done after 2 s; it takes 28 s."""
    expected = expected_seconds(["gpu/sample/sample.cu"] + ["a.cpp"] * 29)
    told = {now_s: told_s for now_s, _, told_s in seconds_left(expected, expected, 32)}
    assert 20 < told[4.0] < 30


def test_a_compile_that_was_broken_off_goes_on() -> None:
    expected = expected_seconds(["host.cpp"] + ["a.cpp"] * 9)
    for _, left_s, told_s in seconds_left(expected, expected, 1, num_before=6):
        assert told_s == pytest.approx(left_s, abs=3.0)


def test_a_file_that_takes_too_long_is_not_taken_for_done() -> None:
    estimate = CompileEstimate([2.0, 2.0], 1)
    done, total = estimate.at(1, 4, 2.0)
    late = [estimate.at(1, 4, now_s) for now_s in (3.0, 4.0, 60.0, 600.0)]
    assert all(done < told < total and whole == total for told, whole in late)
    assert late[2] == late[3]


def test_the_slow_files_are_there() -> None:
    """A file that is renamed takes its figure along."""
    for name in SLOW_FILES_S:
        assert (build.source_dir() / name).is_file(), name
