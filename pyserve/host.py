"""What this machine lets the process use: cores and memory, a container's limits included."""

from __future__ import annotations

import os
from pathlib import Path

from pyserve.config import env

CGROUP = Path("/sys/fs/cgroup")  # version 2, as the process sees it
MEMINFO = Path("/proc/meminfo")


def num_threads() -> int:
    """Threads that a step may use: OMP_NUM_THREADS where it is set, else the usable cores."""
    wanted = env("OMP_NUM_THREADS")
    if wanted is not None and wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return num_cores()


def num_cores() -> int:
    """The usable cores: those it may run on, or a container's share of them, rounded."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = (_read(CGROUP / "cpu.max") or "max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def available_memory_bytes() -> int:
    """Memory that can still be taken without swapping."""
    available = next(
        int(line.split()[1]) * 1024
        for line in MEMINFO.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limit, used = _read(CGROUP / "memory.max"), _read(CGROUP / "memory.current")
    if limit is not None and used is not None and limit.isdecimal():
        stat = (_read(CGROUP / "memory.stat") or "").splitlines()
        # Pages of files that nobody has used lately are given back on demand.
        reclaimable = sum(int(row.split()[1]) for row in stat if row.startswith("inactive_file "))
        available = min(available, max(0, int(limit) - int(used) + reclaimable))
    return available


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
