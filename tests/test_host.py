"""Cores and memory, with and without a container's limits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyserve import host

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4194304 kB\nX: 1 kB\n")
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def test_a_bare_machine(machine: Path) -> None:
    assert host.num_threads() == 8
    assert host.available_memory_bytes() == 4 * GIB


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 8), ("350000 100000", 4), ("10000 100000", 1), ("2000000 100000", 8)],
)
def test_a_container_with_a_share_of_the_cores(machine: Path, limit: str, expected: int) -> None:
    (machine / "cpu.max").write_text(limit + "\n")
    assert host.num_threads() == expected


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("0", 8), ("4,2", 8), ("", 8)])
def test_omp_num_threads_decides(
    machine: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert host.num_threads() == expected


def test_a_container_with_a_memory_limit(machine: Path) -> None:
    (machine / "memory.max").write_text(f"{3 * GIB}\n")
    (machine / "memory.current").write_text(f"{2 * GIB}\n")
    assert host.available_memory_bytes() == GIB
    (machine / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file 7\n")
    assert host.available_memory_bytes() == 2 * GIB
    (machine / "memory.max").write_text("max\n")
    assert host.available_memory_bytes() == 4 * GIB


def test_this_machine() -> None:
    assert 1 <= host.num_threads() <= 4096
    assert host.available_memory_bytes() > 2**20
