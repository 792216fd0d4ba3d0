"""What every bench shares: percentiles, tables, the environment of a run, one JSON file.

Times are seconds inside the program and milliseconds only where they are printed.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pyserve.environment import cpu_name, first_line, version_of

PERCENTILES = (50, 90, 99)


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """mean, p50, p90, p99 (linear interpolation), max and count; None where there is nothing."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    summary = {"mean": float(array.mean())}
    for percent, value in zip(PERCENTILES, np.percentile(array, PERCENTILES), strict=True):
        summary[f"p{percent}"] = float(value)
    return {**summary, "max": float(array.max()), "count": float(array.size)}


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right; row 0 is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_ms(seconds: float) -> str:
    """Milliseconds with about three significant digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def latency_row(name: str, summary: dict[str, float] | None) -> list[str]:
    """One row of a latency table in milliseconds; its header is LATENCY_HEADER."""
    if summary is None:
        return [name] + ["-"] * (len(LATENCY_HEADER) - 1)
    return [name] + [format_ms(summary[key]) for key in LATENCY_HEADER[1:]]


LATENCY_HEADER = ["ms", "mean", "p50", "p90", "p99", "max"]


def environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Where and when this ran; `packages` are those whose versions matter to the figures."""
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": list(os.getloadavg()),
        "gpu": first_line("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "packages": {name: version_of(name) for name in packages},
    }


def busy_remark() -> str:
    """A line where others use this machine's cores, else nothing: wall times then mislead."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load < cores / 4:
        return ""
    return f"! load average {load:.1f} on {cores} cores: others run here, wall times are too long\n"


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write `data` indented where a path was asked for."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
