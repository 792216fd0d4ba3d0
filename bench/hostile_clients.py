"""Do hostile connections hurt? Each kind of them beside a neighbour with three exact streams.

    python -m bench.hostile_clients                   # an own server of the demo model
    python -m bench.hostile_clients --url http://localhost:8000 --pid 1234

bench.fuzz asks what a request may hold; this asks what a connection may do: come in thousands, send
bodies that do not end, read nothing, leave in a way that is not heard. Exit code 1 where a stream
differs or stands still, /health is late, the server's memory grows beyond its bounds, a sequence
outlives its client by more than a second, or something is held afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from bench.hostile import get, post
from bench.neighbour import NUM_TOKENS, QUESTIONS, Neighbour, Seen
from bench.report import format_table
from bench.server_process import memory_of
from bench.soak import metrics, wait_idle
from bench.trial import Trial, conclude, server_parser, try_server
from pyserve.http_client import Endpoint

COMPLETIONS = "/v1/completions"
MIB = 2**20
NUM_CONNECTIONS = 3000
NUM_SLOW_BODIES = 300
NUM_UPLOADS, UPLOAD_BYTES = 24, 30 * MIB
NUM_UNREAD = 250  # of 1.1 MB each, and as much again where they are copied
NUM_GONE = 16
HOLD_S = 2.0
ANSWER_S = 20.0  # for answers that must come, together
GONE_S = 1.0
MAX_GROWTH_MIB = 700  # the bounds of bodies and answers, and what allocators keep beside them
LONG = {"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True, "temperature": 0.8}


@dataclass(slots=True)
class Target:
    """The server that is attacked, for code on a thread of its own."""

    host: str
    port: int

    @contextmanager
    def connections(self, number: int) -> Iterator[list[socket.socket]]:
        """So many of them, without waiting for any to be accepted."""
        sockets = []
        try:
            for _ in range(number):
                sock = socket.socket()
                sockets.append(sock)
                sock.setblocking(False)
                sock.connect_ex((self.host, self.port))
            for sock in sockets:
                sock.settimeout(2.0)
            yield sockets
        finally:
            for sock in sockets:
                sock.close()

    def num_running(self) -> float:
        """Sequences that run or wait."""
        values = asyncio.run(metrics(Endpoint(self.host, self.port)))
        return values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"]


def storm(target: Target) -> str | None:
    """Thousands of silent connections at once."""
    with target.connections(NUM_CONNECTIONS):
        time.sleep(HOLD_S)
    return None


def slow_bodies(target: Target) -> str | None:
    """Bodies that have begun and do not go on."""
    head = post(COMPLETIONS, b" " * 1000)[:-999]
    with target.connections(NUM_SLOW_BODIES) as sockets:
        _send_to_each(sockets, head)
        time.sleep(HOLD_S)
    return None


def uploads(target: Target) -> str | None:
    """Large bodies that lack their last byte: most of them must be refused."""
    body = post(COMPLETIONS, b" " * UPLOAD_BYTES)[:-1]
    with target.connections(NUM_UPLOADS) as sockets:
        _send_to_each(sockets, body)
        statuses = [_status(sock) for sock in sockets]
    if statuses.count(429) < NUM_UPLOADS // 2:
        return f"of {NUM_UPLOADS} bodies of {UPLOAD_BYTES} bytes {statuses.count(429)} got a 429"
    return None


def unread(target: Target) -> str | None:
    """Large answers that nobody reads, of which the engine need not hear."""
    prompt = "What is the capital of France? " * 280  # 3,920 tokens of the demo model
    asked = {"prompt": prompt, "n": 128, "echo": True, "max_tokens": 0}
    with target.connections(NUM_UNREAD) as sockets:
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        _send_to_each(sockets, post(COMPLETIONS, json.dumps(asked).encode()))
        time.sleep(HOLD_S)
        first = b""
        sockets[-1].settimeout(ANSWER_S)
        with suppress(OSError):
            first = sockets[-1].recv(12)
    return None if first == b"HTTP/1.1 200" else f"no answer was made: {first!r}"


def gone(target: Target) -> str | None:
    """Clients that have sent more than is read, and leave."""
    request = post(COMPLETIONS, json.dumps({**LONG, "n": 4}).encode())
    behind = (get("/version") * 200, post(COMPLETIONS, b" " * 10 * MIB))
    num_neighbours = len(QUESTIONS)
    for more in behind:
        with target.connections(NUM_GONE) as sockets:
            _send_to_each(sockets, request)
            _send_to_each(sockets, more, timeout_s=0.05)
            deadline_s = time.perf_counter() + 10.0
            while target.num_running() < 4 * NUM_GONE and time.perf_counter() < deadline_s:
                time.sleep(0.05)
        left_s = time.perf_counter()
        while target.num_running() > num_neighbours:
            if time.perf_counter() - left_s > 10 * GONE_S:
                break
            time.sleep(0.02)
        took_s = time.perf_counter() - left_s
        if took_s > GONE_S:
            return f"sequences of clients that had gone ran on for {took_s:.2f} s"
    return None


def ended(target: Target) -> str | None:
    """Clients that end their side after their request: each is answered."""
    body = json.dumps({"prompt": "Hello", "max_tokens": NUM_TOKENS}).encode()
    with target.connections(NUM_GONE) as sockets:
        _send_to_each(sockets, post(COMPLETIONS, body))
        for sock in sockets:
            sock.shutdown(socket.SHUT_WR)
        deadline_s = time.perf_counter() + ANSWER_S
        statuses = [_status(sock, deadline_s - time.perf_counter()) for sock in sockets]
    if statuses.count(200) != NUM_GONE:
        return f"of {NUM_GONE} clients that ended their side {statuses.count(200)} got a 200"
    return None


ATTACKS: tuple[Callable[[Target], str | None], ...] = (
    storm, slow_bodies, uploads, unread, gone, ended,
)  # fmt: skip


def _send_to_each(sockets: list[socket.socket], data: bytes, timeout_s: float = 2.0) -> None:
    """As much of it as the server takes."""
    for sock in sockets:
        sock.settimeout(timeout_s)
        with suppress(OSError):
            sock.sendall(data)


def _status(sock: socket.socket, timeout_s: float = 0.2) -> int:
    """Of the answer that comes in time, behind interim ones; 0 where there is none."""
    sock.settimeout(max(timeout_s, 0.01))
    received = b""
    with suppress(OSError):
        while piece := sock.recv(65536):
            received += piece
    lines = [line for line in received.splitlines() if line.startswith(b"HTTP/1.1 ")]
    statuses = [int(line.split()[1]) for line in lines]
    return next((status for status in statuses if status != 100), 0)


async def run_attack(
    endpoint: Endpoint, pid: int | None, attack: Callable[[Target], str | None], seen: Seen
) -> tuple[float, list[str]]:
    """MiB that the server has grown by at most, and what is wrong; the neighbour adds to `seen`."""
    neighbour = Neighbour(endpoint, seen)
    await neighbour.start()
    before = memory_of(pid).rss_bytes if pid is not None else 0
    peak = before
    running = asyncio.create_task(asyncio.to_thread(attack, Target(endpoint.host, endpoint.port)))
    while not running.done():
        await asyncio.wait([running], timeout=0.1)
        peak = max(peak, memory_of(pid).rss_bytes if pid is not None else 0)
    await neighbour.stop()
    problem = running.result()
    problems = [] if problem is None else [problem]
    held = await wait_idle(endpoint)
    problems += [f"{name} afterwards: {value:g}" for name, value in held.items() if value]
    return (peak - before) / MIB, problems


def run(trial: Trial, args: argparse.Namespace) -> int:
    """Print a row for each attack and the verdict; the exit code."""
    rows = [["attack", "streams", "longest gap s", "/health ms", "grown MiB"]]
    problems = []
    for attack in ATTACKS:
        name = attack.__name__
        seen = Seen()
        grown_mib, found = asyncio.run(run_attack(trial.endpoint, trial.pid, attack, seen))
        health_s = max(seen.health_s, default=0.0)
        gap_s = max(seen.max_gap_s, seen.max_first_s)  # a stream has to connect first
        figures = [f"{gap_s:.2f}", f"{1e3 * health_s:.0f}", f"{grown_mib:.0f}"]
        rows.append([name, str(seen.num_streams), *figures])
        if gap_s > args.max_gap_s:
            found.append(f"a stream stood still for {gap_s:.2f} s")
        if health_s > args.max_health_s:
            found.append(f"/health took {health_s:.2f} s")
        if grown_mib > MAX_GROWTH_MIB:
            found.append(f"memory grew by {grown_mib:.0f} MiB")
        problems += [f"{name}: {problem}" for problem in [*found, *seen.problems]]
    print(format_table(rows))
    if trial.log is not None and "Traceback" in trial.log.read_text(errors="replace"):
        problems.append("a traceback in the server's log")
    packages = ["pyserve", "aiohttp"]
    return conclude(
        args, "hostile clients", problems, good="nothing hurt", packages=packages, rows=rows
    )


def main(argv: list[str] | None = None) -> int:
    """0: every check passed; 1: one failed or the server could not be reached."""
    args = _parser().parse_args(argv)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    return try_server(args, lambda trial: run(trial, args), ["--dtype", "float32"])


def _parser() -> argparse.ArgumentParser:
    parser = server_parser(__doc__)
    add = parser.add_argument
    add("--max-gap-s", type=float, default=0.5, help="fail above (default %(default)s)")
    add("--max-health-s", type=float, default=1.0, help="fail above (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
