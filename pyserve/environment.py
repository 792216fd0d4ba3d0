"""Describes the machine, for `pyserve collect-env` and the benches, without importing torch.

The values of environment variables that may be secrets are not shown.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from pyserve import __version__

VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "LD_LIBRARY_PATH",
             "OMP_NUM_THREADS", "PYSERVE_CACHE", "PYSERVE_CUDA_ARCHS")  # fmt: skip
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "VLLM_API_KEY")
PROGRAM_TIMEOUT_S = 20.0


def describe_machine() -> list[tuple[str, str]]:
    """(name, value) of all that a bug report should contain, in the order in which to show it."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap")
    rows = [
        ("pyserve", __version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("CPU", cpu_name()),
        ("cores", str(len(os.sched_getaffinity(0)))),
        ("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"),
        ("GPU", first_line(*query, "--format=csv,noheader") or "none that nvidia-smi knows"),
        ("g++", first_line("g++", "--version") or "not found"),
        ("nvcc", last_line("nvcc", "--version") or "not found"),
    ]
    for name in _packages():
        rows.append((name, version_of(name) or "not installed"))
    rows += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    return rows + [(name, "is set") for name in SECRETS if os.environ.get(name)]


def version_of(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def first_line(*command: str) -> str | None:
    """The first line that a command prints; None where it does not exist, hangs or fails."""
    return next(iter(_lines(*command)), None)


def last_line(*command: str) -> str | None:
    """The last line that a command prints; None where it does not exist, hangs or fails."""
    return next(reversed(_lines(*command)), None)


def cpu_name() -> str:
    """The CPU's model name, or the machine type where the system does not tell that."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _packages() -> list[str]:
    """Packages that pyserve depends on; only torch in a checkout that is not installed."""
    try:
        found = metadata.requires("pyserve") or []
    except metadata.PackageNotFoundError:
        found = ["torch"]
    return [re.split(r"[^A-Za-z0-9._-]", text)[0] for text in found if "extra ==" not in text]


def _lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines()] if done.returncode == 0 else []
