"""Estimates how far a compile is, and how long it will take, from the known times of its files.

Counting files would mislead: one kernel takes more than a third of the total time, and on a machine
with many cores it runs alone at the end. Therefore the build is simulated beforehand, and the real
progress then tells how fast this machine is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

# Seconds on one core at about 3 GHz, kernels compiled for one card; measured with g++ 12 and nvcc
# 13.0.
_CPP_S, _CU_S = 1.8, 2.5
SLOW_FILES_S = {
    "gpu/sample/sample.cu": 28.0,
    "host.cpp": 8.0,  # pybind11's headers
    "gpu/attention/prefill.cu": 7.0,
    "gpu/attention/decode.cu": 6.0,
    "gpu/attention/decode_general.cu": 6.0,
    "gpu/attention/prefill_general.cu": 5.0,
}
_LINK_S = 0.3
NUM_LINKS = 2
_MOST_OF_A_STEP = 0.95  # a running step never counts as more than this part of its time


def expected_seconds(files: Iterable[str]) -> list[float]:
    """The expected seconds of each file, named relative to the folder of sources."""
    return [SLOW_FILES_S.get(name, _CU_S if name.endswith(".cu") else _CPP_S) for name in files]


class CompileEstimate:
    """Estimates one compile: files that take `seconds`, started in this order on `num_cores` cores,
    then NUM_LINKS link steps."""

    def __init__(self, seconds: Sequence[float], num_cores: int) -> None:
        cores = [0.0] * max(1, num_cores)
        ends = []
        for file_s in seconds:
            ends.append(heapq.heappop(cores) + file_s)
            heapq.heappush(cores, ends[-1])
        ends.sort()
        ends += [ends[-1] + _LINK_S * (index + 1) for index in range(NUM_LINKS)]
        self._ends = [0.0, *ends]  # _ends[i]: when i steps should have ended
        self._num_done = 0
        self._done_s = 0.0  # when the last finished step has ended

    def at(self, num_done: int, num_steps: int, elapsed_s: float) -> tuple[int, int]:
        """(done, total) in expected milliseconds, elapsed_s seconds after the start.

        num_steps is the number of steps of this run of the build tool. It is less than all steps if
        an earlier run was interrupted; then those that end first are assumed to be done.
        """
        num_before = max(0, len(self._ends) - 1 - num_steps)
        if num_done != self._num_done:
            self._num_done, self._done_s = num_done, elapsed_s
        first_s = self._ends[num_before]
        last_s = self._ends[-1]
        index = min(num_before + self._num_done, len(self._ends) - 1)
        done_s = self._ends[index] - first_s
        if index < len(self._ends) - 1:
            # Add the elapsed part of the step that ends next, at the speed of the finished ones.
            speed = done_s / self._done_s if self._num_done and self._done_s > 0 else 1.0
            step_s = self._ends[index + 1] - self._ends[index]
            since_s = max(0.0, elapsed_s - self._done_s)
            done_s += min(since_s * speed, _MOST_OF_A_STEP * step_s)
        return round(1000 * done_s), round(1000 * (last_s - first_s))
