"""One server process under a bench's control: started on a free port, timed, measured, stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PYSERVE = (sys.executable, "-m", "pyserve")
PORT_POLL_S = 0.002
HEALTH_POLL_S = 0.02
_LOG_TAIL_CHARS = 3000


@dataclass(slots=True)
class StartTimes:
    """Seconds since the process was spawned.

    phases          phase of /health -> when it was first seen.
    max_health_s    the slowest answer of /health before it was ready.
    """

    port_open_s: float = 0.0
    health_s: float = 0.0
    ready_s: float = 0.0
    max_health_s: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)


class ServerProcess:
    """A running server; `log` holds what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.spawned_s = time.perf_counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self, timeout_s: float) -> StartTimes:
        """Poll until /health says 200. RuntimeError with the log's end where that fails."""
        times = StartTimes()
        while not self._port_is_open():
            self._check(timeout_s)
            time.sleep(PORT_POLL_S)
        times.port_open_s = self._elapsed_s()
        while not times.ready_s:
            asked_s = self._elapsed_s()
            status, body = self._health()
            now_s = self._elapsed_s()
            times.health_s = times.health_s or now_s
            phase = "ready" if status == 200 else _phase(body)
            times.phases.setdefault(phase, now_s)
            if status == 200:
                times.ready_s = now_s
            else:
                times.max_health_s = max(times.max_health_s, now_s - asked_s)
                self._check(timeout_s)
                time.sleep(HEALTH_POLL_S)
        return times

    def stop(self, timeout_s: float = 30.0) -> float:
        """SIGTERM, then SIGKILL; returns how long the end took in seconds."""
        started_s = time.perf_counter()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return time.perf_counter() - started_s

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self.spawned_s

    def _check(self, timeout_s: float) -> None:
        reason = None
        if self.process.poll() is not None:
            reason = f"the server ended with exit code {self.process.returncode}"
        elif self._elapsed_s() > timeout_s:
            reason = f"the server was not ready after {timeout_s:g} s"
        if reason is not None:
            tail = self.log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]
            raise RuntimeError(f"{reason}; its log ends:\n{tail}")

    def _port_is_open(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def _health(self) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=30) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()


@contextmanager
def running_server(
    flags: Sequence[str] = (),
    *,
    command: Sequence[str] = PYSERVE,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[ServerProcess]:
    """Spawn `command --host 127.0.0.1 --port FREE flags...` in `folder`; stop it at the end."""
    port = free_port()
    arguments = [*command, "--host", "127.0.0.1", "--port", str(port), *flags]
    with tempfile.TemporaryDirectory(prefix="pyserve-bench-") as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                arguments,
                stdout=sink,
                stderr=sink,
                cwd=folder,
                env={**os.environ, **(environment or {})},
            )
        server = ServerProcess(process, port, log)
        try:
            yield server
        finally:
            server.stop()


def free_port() -> int:
    """A port that nothing listens on, below those that the system gives to connections: one of
    them could take it before the server does."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("0.0.0.0", port))
            return port


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory of a process and its descendants, in bytes, summed over them."""

    rss_bytes: int
    peak_bytes: int  # VmHWM
    anonymous_bytes: int  # what is not backed by a file


def memory_of(pid: int) -> Memory:
    """From /proc. ProcessLookupError where `pid` is gone."""
    sums = {"VmRSS": 0, "VmHWM": 0, "RssAnon": 0}
    if not Path(f"/proc/{pid}").exists():
        raise ProcessLookupError(f"no process {pid}")
    for member in _tree(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # a child that has ended meanwhile
        for line in lines:
            name, _, value = line.partition(":")
            if name in sums:
                sums[name] += int(value.split()[0]) * 1024
    return Memory(sums["VmRSS"], sums["VmHWM"], sums["RssAnon"])


def card_mib() -> int:
    """MiB in use on all cards of this machine, by everybody. RuntimeError where nobody tells."""
    if shutil.which("nvidia-smi") is None:
        raise RuntimeError("there is no nvidia-smi")
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise RuntimeError(f"nvidia-smi: {done.stdout.strip() or done.stderr.strip()}")
    return sum(int(line) for line in done.stdout.split())


def _tree(pid: int) -> list[int]:
    members = [pid]
    for member in members:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                members += [int(word) for word in children.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
    return members


def _phase(body: bytes) -> str:
    """The phase that a server names while it is not ready."""
    try:
        decoded = json.loads(body)
    except ValueError:
        return "no answer"
    return str(decoded.get("phase", "?")) if isinstance(decoded, dict) else "?"
