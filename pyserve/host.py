"""The cores and the memory that the process may use, with the limits of a container."""

from __future__ import annotations

import os
from pathlib import Path

from pyserve.config import env

CGROUP = Path("/sys/fs/cgroup")  # cgroup version 2, as the process sees it
MEMINFO = Path("/proc/meminfo")


def num_threads() -> int:
    """Number of threads that a step may use: OMP_NUM_THREADS if it is set, else `num_cores`."""
    wanted = env("OMP_NUM_THREADS")
    if wanted is not None and wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return num_cores()


def num_cores() -> int:
    """Number of cores that the process may use, from its CPU affinity and its cgroup's quota."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = (_read(CGROUP / "cpu.max") or "max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def available_memory_bytes() -> int:
    """Bytes that can still be allocated without swapping or exceeding the cgroup's limit."""
    available = next(
        int(line.split()[1]) * 1024
        for line in MEMINFO.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limit, used = _read(CGROUP / "memory.max"), _read(CGROUP / "memory.current")
    if limit is not None and used is not None and limit.isdecimal():
        stat = (_read(CGROUP / "memory.stat") or "").splitlines()
        # Inactive pages of the file cache are reclaimed on demand, so they count as available.
        reclaimable = sum(int(row.split()[1]) for row in stat if row.startswith("inactive_file "))
        available = min(available, max(0, int(limit) - int(used) + reclaimable))
    return available


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
