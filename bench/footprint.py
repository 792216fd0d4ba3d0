"""What pyserve costs before it serves: import, start, installed bytes, host memory.

    python -m bench.footprint -- --model /path/to/model --load-format dummy

What follows `--` goes to `python -m pyserve`; without it the demo model is served. Starts are
medians over `--runs`; the page cache is as warm as the machine has it. `--cold-build` puts one
start with an empty cache folder first, which compiles the native products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.report import busy_remark, environment, format_table, write_json
from bench.server_process import ServerProcess, memory_of, running_server
from pyserve.remote.workload import LoadSpec, run_load

MODULES = ("pyserve", "pyserve.api.serve")
INSTALLED_SCRIPT = Path(__file__).with_name("installed.py")
MIB = 2**20
READY_TIMEOUT_S = 600.0
LOAD_REQUESTS, LOAD_CONCURRENCY = 64, 16

_IMPORT_PROGRAM = """
import sys, time, resource
before = len(sys.modules)
started, cpu = time.perf_counter(), time.process_time()
__import__(sys.argv[1])
took, cpu = time.perf_counter() - started, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(took, cpu, len(sys.modules) - before, int("torch" in sys.modules), peak)
"""

_BYTECODE_PROGRAM = """
import importlib.util, os, sys
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    if spec is not None and not os.path.isfile(spec.cached or ""):
        print(name)
"""


@dataclass(slots=True)
class Start:
    """One start; seconds since the process was spawned, bytes of its whole process tree.

    max_busy_health_s  the slowest /health while the small load ran.
    """

    port_open_s: float
    health_s: float
    max_health_s: float
    ready_s: float
    first_token_s: float
    first_request_s: float
    rss_ready_bytes: int
    peak_ready_bytes: int
    rss_loaded_bytes: int = 0
    peak_loaded_bytes: int = 0
    anonymous_loaded_bytes: int = 0
    max_busy_health_s: float = 0.0
    shutdown_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)


def import_cost(python: str, module: str, runs: int) -> dict[str, float]:
    """Median seconds of `import module` in fresh interpreters, modules loaded, peak bytes."""
    seconds, cpu, wall = [], [], []
    for _ in range(runs):
        started_s = time.perf_counter()
        done = subprocess.run(
            [python, "-c", _IMPORT_PROGRAM, module],
            capture_output=True, text=True, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        wall.append(time.perf_counter() - started_s)
        if done.returncode != 0:
            raise RuntimeError(f"import {module} fails: {done.stderr.strip().splitlines()[-1]}")
        took, cpu_s, num_modules, has_torch, peak_kib = done.stdout.split()
        seconds.append(float(took))
        cpu.append(float(cpu_s))
    return {
        "import_s": statistics.median(seconds),
        "cpu_s": statistics.median(cpu),  # what a busy machine does not stretch
        "interpreter_s": statistics.median(wall),
        "num_modules": int(num_modules),
        "imports_torch": int(has_torch),
        "peak_bytes": int(peak_kib) * 1024,
    }


def without_bytecode(python: str, packages: Sequence[str]) -> list[str]:
    """Those that Python compiles anew at every start: they were installed without bytecode, and
    PYTHONDONTWRITEBYTECODE or a folder that is only read keeps it from writing any."""
    done = subprocess.run(
        [python, "-c", _BYTECODE_PROGRAM, *packages],
        capture_output=True, text=True, cwd=tempfile.gettempdir(), check=True,
    )  # fmt: skip
    return done.stdout.split()


def installed(python: str) -> dict[str, Any]:
    """Distributions beside torch, as bench/installed.py reports them for `python`."""
    done = subprocess.run([python, str(INSTALLED_SCRIPT)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    report: dict[str, Any] = json.loads(done.stdout)
    report["bytes"] = sum(report["packages"].values())
    report["excluded_bytes"] = sum(report["excluded"].values())
    return report


def measure_start(
    command: Sequence[str],
    flags: Sequence[str],
    *,
    with_load: bool,
    vocab_size: int = 256,
    server_environment: dict[str, str] | None = None,
) -> Start:
    """Start, ask for one token, optionally run the small load, stop."""
    folder = Path(tempfile.gettempdir())
    with running_server(
        flags, command=command, environment=server_environment, folder=folder
    ) as server:
        times = server.wait_ready(READY_TIMEOUT_S)
        asked_s = time.perf_counter()
        first_token_s = _first_token(server) - server.spawned_s
        memory = memory_of(server.pid)
        start = Start(
            port_open_s=times.port_open_s,
            health_s=times.health_s,
            max_health_s=times.max_health_s,
            ready_s=times.ready_s,
            first_token_s=first_token_s,
            first_request_s=first_token_s - (asked_s - server.spawned_s),
            rss_ready_bytes=memory.rss_bytes,
            peak_ready_bytes=memory.peak_bytes,
            phases=times.phases,
        )
        if with_load:
            _load(server, start, vocab_size)
        start.shutdown_s = server.stop()
    return start


def _first_token(server: ServerProcess) -> float:
    """perf_counter at the first streamed frame of a text completion."""
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if line.startswith(b"data:"):
                    now = time.perf_counter()
                    response.read()
                    return now
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(f"the first request: HTTP {error.code} {error.read()!r}") from None
    raise RuntimeError("the first request was answered without a frame")


def _load(server: ServerProcess, start: Start, vocab_size: int) -> None:
    spec = LoadSpec(
        url=server.url, models=(), input_len=(16, 64), output_len=(16, 64),
        vocab_size=vocab_size, num_requests=LOAD_REQUESTS, concurrency=LOAD_CONCURRENCY,
    )  # fmt: skip
    with _polled_health(server) as slowest:
        reports = run_load(spec, 1)
    errors = [r.error for report in reports for r in report.records if r.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {LOAD_REQUESTS} requests failed: {errors[0]}")
    memory = memory_of(server.pid)
    start.max_busy_health_s = max(slowest)
    start.rss_loaded_bytes = memory.rss_bytes
    start.peak_loaded_bytes = memory.peak_bytes
    start.anonymous_loaded_bytes = memory.anonymous_bytes


@contextmanager
def _polled_health(server: ServerProcess) -> Iterator[list[float]]:
    """Times /health from a thread; the list grows by one a poll."""
    slowest = [0.0]
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(0.05):
            asked_s = time.perf_counter()
            with urllib.request.urlopen(f"{server.url}/health", timeout=60) as response:
                response.read()
            slowest.append(time.perf_counter() - asked_s)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield slowest
    finally:
        stop.set()
        thread.join()


def _render_start(title: str, starts: list[Start]) -> str:
    def seconds(name: str) -> list[str]:
        values = [getattr(start, name) for start in starts]
        return [f"{statistics.median(values):.3f}", f"{max(values):.3f}"]

    rows = [
        [f"{title}, seconds since spawn", "median", "max"],
        ["port open", *seconds("port_open_s")],
        ["first answer of /health", *seconds("health_s")],
        ["slowest /health before ready (its own time)", *seconds("max_health_s")],
        ["/health 200", *seconds("ready_s")],
        ["first token", *seconds("first_token_s")],
        ["  that request's own time", *seconds("first_request_s")],
        ["slowest /health under load (its own time)", *seconds("max_busy_health_s")],
        ["SIGTERM to exit (its own time)", *seconds("shutdown_s")],
    ]
    phases = ", ".join(f"{name} at {at:.2f} s" for name, at in starts[-1].phases.items())
    return f"{format_table(rows)}\nphases of the last start: {phases}"


def _render_memory(start: Start) -> str:
    names = ("rss_ready", "peak_ready", "rss_loaded", "peak_loaded", "anonymous_loaded")
    labels = ("after the first request", "  peak (VmHWM)", "after the small load",
              "  peak (VmHWM)", "  of it anonymous")  # fmt: skip
    rows = [["host memory", "MiB"]]
    for label, name in zip(labels, names, strict=True):
        rows.append([label, f"{getattr(start, name + '_bytes') / MIB:,.1f}"])
    return format_table(rows)


def _render_static(costs: dict[str, dict[str, float]], packages: dict[str, Any]) -> str:
    rows = [["import", "ms", "CPU ms", "whole interpreter ms", "modules", "torch", "peak MiB"]]
    for module, cost in costs.items():
        rows.append(
            [
                module,
                f"{cost['import_s'] * 1e3:.0f}",
                f"{cost['cpu_s'] * 1e3:.0f}",
                f"{cost['interpreter_s'] * 1e3:.0f}",
                f"{cost['num_modules']:.0f}",
                "yes" if cost["imports_torch"] else "no",
                f"{cost['peak_bytes'] / MIB:.1f}",
            ]
        )
    largest = sorted(packages["packages"].items(), key=lambda item: -item[1])
    sizes = [["installed", "packages", "MiB"]]
    sizes.append(["beside torch", str(len(packages["packages"])), f"{packages['bytes'] / MIB:.1f}"])
    for name, size in largest[:6]:
        sizes.append([f"  {name}", "", f"{size / MIB:.1f}"])
    own = packages["packages"].get("pyserve", 0) / MIB
    note = " (editable: its source folder)" if packages["is_editable"] else ""
    sizes.append([f"  pyserve itself{note}", "", f"{own:.1f}"])
    sizes.append(
        [
            "torch and what it requires",
            str(len(packages["excluded"])),
            f"{packages['excluded_bytes'] / MIB:.1f}",
        ]
    )
    return format_table(rows) + "\n\n" + format_table(sizes)


def main(argv: list[str] | None = None) -> int:
    """0: measured; 1: the server could not be started or a request failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--python", default=sys.executable, help="interpreter whose installation is measured")
    add("--runs", type=int, default=5, help="starts; imports are repeated as often")
    add("--cold-build", action="store_true", help="first a start with an empty cache folder")
    add("--vocab-size", type=int, default=256, help="token ids of the load are below")
    add("--no-start", action="store_true", help="only imports and installed bytes")
    add("--json", type=Path, metavar="FILE")
    add("flags", nargs="*", help="after --: flags of the server")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error(f"--runs must be at least 1, got {args.runs}")
    command = (args.python, "-m", "pyserve")
    print(busy_remark(), end="")
    try:
        result = _measure(args, command)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    about = environment(["torch", "pyserve"])
    write_json(args.json, {"flags": args.flags, "environment": about, "result": result})
    return 0


def _measure(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    costs = {module: import_cost(args.python, module, args.runs) for module in MODULES}
    packages = installed(args.python)
    print(_render_static(costs, packages))
    bare = without_bytecode(args.python, ("pyserve", "torch", "aiohttp"))
    if bare:
        print(f"\nwithout bytecode, compiled anew at every start: {', '.join(bare)}")
    result: dict[str, Any] = {"import": costs, "installed": packages, "without_bytecode": bare}
    if args.no_start:
        return result
    if args.cold_build:
        with tempfile.TemporaryDirectory(prefix="pyserve-cache-") as cache:
            cold = measure_start(
                command, args.flags, with_load=False, server_environment={"PYSERVE_CACHE": cache}
            )
            built = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        print(f"\n{_render_start('first start, empty cache', [cold])}")
        print(f"the build left {built / MIB:.1f} MiB in the cache")
        result.update(cold_start=asdict(cold), build_bytes=built)
    starts = [
        measure_start(command, args.flags, with_load=True, vocab_size=args.vocab_size)
        for _ in range(args.runs)
    ]
    print(f"\n{_render_start(f'start, {args.runs} runs', starts)}\n\n{_render_memory(starts[-1])}")
    result["starts"] = [asdict(start) for start in starts]
    return result


if __name__ == "__main__":
    sys.exit(main())
