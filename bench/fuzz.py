"""Does hostile input hurt? Malformed requests of a seed, beside a neighbour with exact streams.

    python -m bench.fuzz                              # 20,000 cases of seed 0 at an own server
    python -m bench.fuzz --seed 7 -n 100000
    python -m bench.fuzz --url http://localhost:8000 --pid 1234 --log server.log
    python -m bench.fuzz --seed 7 --only 4711         # one case again: its bytes and its answer
    python -m bench.fuzz --family template -n 500 -- --trust-request-chat-template

Without --url a server is started in float32, in which greedy answers do not depend on batch mates
(flags after `--` go to it). Exit code 1 where a check fails: a 5xx that is no 503, an answer that
is no HTTP or no error object of ours, a status that may not be, no answer at all; a neighbour's
stream that differs, stops or stands still; a slow /health; afterwards a request, a KV block or a
socket that is held, memory that grew, a traceback in the log.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import math
import os
import re
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.answers import Answer, read_answers
from bench.hostile import FAMILIES, Case, make_case
from bench.neighbour import Neighbour, Seen, ask_health
from bench.report import format_table
from bench.server_process import memory_of
from bench.soak import wait_idle
from bench.suspects import Suspects
from bench.trial import Trial, conclude, server_parser, try_server
from pyserve.http_client import Endpoint, fetch

PARTS = 5
WARM_PARTS = 2  # allocators fill up: growth is counted from the end of these
MIB = 2**20
ANSWER_TIMEOUT_S = 30.0
MAX_SLOW = 200  # connections that wait, beside the others
MAX_FAILURES = 20  # kinds of them
MAX_FAILED_CASES = 1000
CLOSE_TIMEOUT_S = 15.0
PANIC = 'start: a "b"\na[lazy]: /.*/'
SETTLE_S, SETTLE_TIMEOUT_S = 3.0, 30.0
SETTLE_CHARS = 2**19  # the server gives back what is free behind a text that is so long
SETTLE_GRAMMARS = 64  # the server keeps so many, of whatever sizes the cases had
SHOWN_BYTES = 1000
SMALL_ANSWER_BYTES, LOOK_PAUSE_S = 2**16, 0.1
_RESET = struct.pack("ii", 1, 0)


class Exchange(asyncio.Protocol):
    """One connection of one case: what came, and when enough has come."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.received = bytearray()
        self.is_closed = False
        self.done = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.broken: str | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        limit = self.case.abort_bytes
        if limit is not None and len(self.received) >= limit:
            self._end()
        elif len(self.received) <= SMALL_ANSWER_BYTES:
            self._look()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_PAUSE_S, self._look)

    def _look(self) -> None:
        """Whether enough has come: all of it is read again, so not at each piece of 30 MB."""
        self._timer = None
        wanted = self.case.num_answers
        if wanted and len(self.answers()[0]) >= wanted:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._end()

    def answers(self) -> tuple[list[Answer], bytes]:
        """Whole answers so far, and the rest."""
        if self.broken is not None:
            return [], b""
        try:
            return read_answers(bytes(self.received), heads=self.case.heads, at_end=self.is_closed)
        except ValueError as error:
            self.broken = str(error)
            self._end()
            return [], b""

    def leave(self, ending: str) -> None:
        assert self.transport is not None
        if ending == "reset":
            sock = self.transport.get_extra_info("socket")
            if not self.transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        else:
            self.transport.close()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


@dataclass(slots=True)
class Failure:
    """The first case that has failed in one way, and how many more have."""

    case: Case
    problem: str
    answer: bytes
    count: int = 1
    again: str = ""  # what came of it alone, afterwards


@dataclass(slots=True)
class Tally:
    """What has come of the cases."""

    num_sent: int = 0
    num_failed: int = 0
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)  # by kind
    seen: Seen = field(default_factory=Seen)
    suspects: Suspects = field(default_factory=Suspects)

    def add(self, case: Case, status: str, problem: str | None, answer: bytes) -> None:
        self.num_sent += 1
        self.statuses.setdefault(case.family, Counter())[status] += 1
        if problem is None:
            return
        self.num_failed += 1
        kind = re.sub(r"\d{4,}", "#", problem)
        if kind in self.failures:
            self.failures[kind].count += 1
        elif len(self.failures) < MAX_FAILURES:
            self.failures[kind] = Failure(case, problem, answer)

    @property
    def is_hopeless(self) -> bool:
        return self.num_failed >= MAX_FAILED_CASES or self.seen.has_enough


async def run_case(endpoint: Endpoint, case: Case) -> tuple[list[Answer], str | None, bytes]:
    """Send `case`: its answers, what is wrong with them (None: nothing), and all that came."""
    loop = asyncio.get_running_loop()
    try:
        transport, exchange = await loop.create_connection(
            lambda: Exchange(case), endpoint.host, endpoint.port, local_addr=_local(endpoint)
        )
    except OSError as error:
        return [], f"cannot connect: {error}", b""
    for number, piece in enumerate(case.pieces):
        if number and case.pause_s:
            await asyncio.wait([exchange.done], timeout=case.pause_s)
        if transport.is_closing():
            break
        transport.write(piece)
    if case.ending == "half" and not transport.is_closing():
        transport.write_eof()
    is_late = False
    if not exchange.done.done():
        patience_s = ANSWER_TIMEOUT_S if case.num_answers else case.patience_s
        await asyncio.wait([exchange.done], timeout=patience_s)
        is_late = not exchange.done.done()
    answers, rest = exchange.answers()
    is_closed = exchange.is_closed
    exchange.leave(case.ending)
    received = bytes(exchange.received)
    problem = exchange.broken or _judge(case, answers, rest, is_closed)
    if problem is None and case.num_answers and is_late:
        problem = f"{len(answers)} of {case.num_answers} answers after {ANSWER_TIMEOUT_S:g} s"
    return answers, problem, received


def _local(endpoint: Endpoint) -> tuple[str, int] | None:
    """Another address than the neighbour's, where there is one: clients are told apart by it."""
    is_loopback = endpoint.host == "127.0.0.1" and sys.platform == "linux"
    return ("127.0.0.2", 0) if is_loopback else None


def _judge(case: Case, answers: list[Answer], rest: bytes, is_closed: bool) -> str | None:
    """What is wrong with the answers of a case; None: nothing."""
    for answer in answers:
        problem = answer.problem(case.request)
        if problem is not None:
            return problem
    if case.num_answers == 0:
        return None
    if is_closed:
        if rest:
            return "the connection was lost in the middle of an answer"
        if not answers:
            return "the connection was closed without an answer"
        if len(answers) < case.num_answers and not answers[-1].closes:
            return f"closed after {len(answers)} of {case.num_answers} answers, unannounced"
    if case.wanted and len(answers) > case.num_answers:
        return f"{len(answers)} answers, asked for {case.num_answers}"  # request smuggling
    if case.wanted and len(answers) == case.num_answers:
        status = answers[-1].status
        if status not in case.wanted:
            return f"status {status}, may be {' or '.join(map(str, case.wanted))}"
    return None


async def fuzz(endpoint: Endpoint, tally: Tally, numbers: range, args: argparse.Namespace) -> None:
    """Send the cases `numbers`, args.concurrency at once, those that wait beside them."""
    remaining = iter(numbers)
    slow_slots = asyncio.Semaphore(MAX_SLOW)
    waiting: set[asyncio.Task[None]] = set()

    async def one(case: Case) -> None:
        with tally.suspects.watch(case):
            answers, problem, received = await run_case(endpoint, case)
        status = str(answers[-1].status) if answers else "none"
        tally.add(case, status, problem, received)

    async def one_slow(case: Case) -> None:
        try:
            await one(case)
        finally:
            slow_slots.release()

    async def slot() -> None:
        for number in remaining:
            if tally.is_hopeless:
                return
            case = make_case(args.seed, number, args.family)
            if case.is_slow:
                await slow_slots.acquire()
                task = asyncio.create_task(one_slow(case))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            else:
                await one(case)

    await asyncio.gather(*(slot() for _ in range(args.concurrency)))
    await asyncio.gather(*waiting)


async def run_fuzz(endpoint: Endpoint, pid: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """PARTS equal parts, memory read after each; then what is left of them is looked at."""
    tally = Tally()
    await warm_up(endpoint)
    await wait_idle(endpoint)
    num_files = count_files(pid)
    neighbour = Neighbour(endpoint, tally.seen)
    await neighbour.start()
    rss_bytes: list[int] = []
    started_s = time.perf_counter()
    bounds = [args.num_cases * part // PARTS for part in range(PARTS + 1)]
    try:
        for first, end in itertools.pairwise(bounds):
            await fuzz(endpoint, tally, range(first, end), args)
            if pid is not None and Path(f"/proc/{pid}").exists():
                await settle(endpoint, pid)
                rss_bytes.append(memory_of(pid).rss_bytes)
    finally:
        wall_s = time.perf_counter() - started_s
        await neighbour.stop()
    for failure in tally.failures.values():
        _, problem, _ = await run_case(endpoint, failure.case)
        failure.again = problem or "nothing wrong"
    after: dict[str, Any] = {}
    try:
        after["held"] = await wait_idle(endpoint)
        after["health_s"] = max(ask_health(endpoint) for _ in range(20))
        after["num_files"] = await wait_files(pid, num_files)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        after["problem"] = f"the server does not answer afterwards: {error}"
    return {
        "tally": tally,
        "wall_s": wall_s,
        "rss_bytes": rss_bytes,
        "num_files": num_files,
        "after": after,
    }


async def warm_up(endpoint: Endpoint) -> None:
    """Have the engine of grammars panic, as some cases do: at the first time it reads the symbols
    of its library for a trace, and keeps the 36 MB that they take.
    """
    await fetch(endpoint, "/v1/completions", {"prompt": "x", "guided_grammar": PANIC})


async def settle(endpoint: Endpoint, pid: int | None) -> None:
    """Wait until nothing is under way and what was freed has gone back to the system: what the
    server takes afterwards is held, and its grammars are always the same small ones.
    """
    for number in range(SETTLE_GRAMMARS):
        body = {"prompt": "x", "max_tokens": 1, "guided_choice": [f"settle {number}"]}
        await fetch(endpoint, "/v1/completions", body)
    before, deadline_s = math.inf, time.perf_counter() + SETTLE_TIMEOUT_S
    while time.perf_counter() < deadline_s:
        await asyncio.sleep(SETTLE_S)  # texts of clients that have left may still be worked on
        await fetch(endpoint, "/tokenize", {"prompt": "settle " * (SETTLE_CHARS // 7)})
        if pid is None or not Path(f"/proc/{pid}").exists():
            return
        now = memory_of(pid).rss_bytes
        if now > before - MIB:
            return
        before = now


def count_files(pid: int | None) -> int | None:
    """Open files and sockets of a process; None where that is not known."""
    if pid is None:
        return None
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


async def wait_files(pid: int | None, at_most: int | None) -> int | None:
    """How many are open once it is no more than `at_most`, or after CLOSE_TIMEOUT_S."""
    deadline_s = time.perf_counter() + CLOSE_TIMEOUT_S
    while True:
        now = count_files(pid)
        if now is None or at_most is None or now <= at_most or time.perf_counter() > deadline_s:
            return now
        await asyncio.sleep(0.1)


def judge(result: dict[str, Any], log: Path | None, args: argparse.Namespace) -> list[str]:
    """Print the figures and each failure with its request; returns what is wrong."""
    tally: Tally = result["tally"]
    seen = tally.seen
    columns = sorted({status for counts in tally.statuses.values() for status in counts})
    rows = [["answers", *columns]]
    for family in FAMILIES:
        if family in tally.statuses:
            counts = tally.statuses[family]
            rows.append([family, *(f"{counts[status]:,}" for status in columns)])
    print(format_table(rows))
    worst_health_s = max(seen.health_s, default=0.0)
    print(
        f"{tally.num_sent:,} cases in {result['wall_s']:.1f} s "
        f"({tally.num_sent / result['wall_s']:,.0f} a second); neighbour: {seen.num_streams} "
        f"streams, longest gap {1e3 * seen.max_gap_s:.0f} ms, longest wait for a first token "
        f"{1e3 * seen.max_first_s:.0f} ms; /health: {len(seen.health_s)} answers, "
        f"slowest {1e3 * worst_health_s:.0f} ms"
    )
    print("\n".join(tally.suspects.describe(seen.gaps)))
    problems = [
        f"{f.count} cases, the first {f.case.number} ({f.case.family}): {f.problem}"
        for f in tally.failures.values()
    ]
    problems += [f"neighbour: {text}" for text in seen.problems]
    if not seen.num_streams:
        problems.append("the neighbour has not had a stream")
    if seen.max_gap_s > args.max_gap_s:
        problems.append(f"a neighbour's stream stood still for {seen.max_gap_s:.3f} s")
    if seen.max_first_s > args.max_first_s:
        problems.append(f"a neighbour's stream waited {seen.max_first_s:.3f} s for its first token")
    if tally.suspects.slowest_s > args.max_answer_s:
        problems.append(f"an answer took {tally.suspects.slowest_s:.2f} s")
    if worst_health_s > args.max_health_s:
        problems.append(f"/health took {worst_health_s:.2f} s")
    problems += _judge_after(result, args)
    if log is not None:
        problems += _judge_log(log)
    for failure in tally.failures.values():
        _print_failure(failure, args)
    return problems


def _judge_after(result: dict[str, Any], args: argparse.Namespace) -> list[str]:
    after = result["after"]
    if "problem" in after:
        return [after["problem"]]
    problems = [f"{name}: {value:g}" for name, value in after["held"].items() if value]
    if after["health_s"] > args.max_health_s:
        problems.append(f"/health afterwards took {after['health_s']:.2f} s")
    if result["num_files"] is not None:
        print(f"open files: {result['num_files']} before, {after['num_files']} after")
        if after["num_files"] > result["num_files"]:
            problems.append(f"{after['num_files'] - result['num_files']} open files more")
    rss_bytes = result["rss_bytes"]
    if not rss_bytes:
        print("server memory was not read: pass --pid")
        return problems
    growth_mib = (rss_bytes[-1] - rss_bytes[min(WARM_PARTS, len(rss_bytes)) - 1]) / MIB
    series = " ".join(f"{value / MIB:.1f}" for value in rss_bytes)
    print(
        f"server RSS MiB after each fifth: {series}; growth since the second {growth_mib:+.2f} "
        f"MiB (limit {args.max_growth_mib:g})"
    )
    if growth_mib > args.max_growth_mib:
        problems.append(f"memory grew by {growth_mib:.2f} MiB")
    return problems


def _judge_log(log: Path) -> list[str]:
    text = log.read_text(errors="replace")
    lines = text.splitlines()
    print(f"server log: {len(lines)} lines, {len(text) / 1024:.0f} KiB")
    for number, line in enumerate(lines):
        if "Traceback" in line or "never retrieved" in line:
            print("\n".join(lines[max(number - 2, 0) : number + 30]))
            return ["a traceback in the server's log"]
    return []


def _print_failure(failure: Failure, args: argparse.Namespace) -> None:
    case = failure.case
    print(f"\ncase {case.title}: {failure.problem}")
    print(f"  alone, again: {failure.again}")
    family = f" --family {args.family}" if args.family else ""
    print(f"  python -m bench.fuzz --seed {args.seed} --only {case.number}{family}")
    print(f"  sent {_shown(case.request)}")
    print(f"  came {_shown(failure.answer)}")


def _shown(data: bytes) -> str:
    more = f" ... {len(data)} bytes in all" if len(data) > SHOWN_BYTES else ""
    return f"{data[:SHOWN_BYTES]!r}{more}"


def main(argv: list[str] | None = None) -> int:
    """0: every check passed; 1: one failed or the server could not be reached."""
    args = _parser().parse_args(argv)
    return try_server(args, lambda trial: _try(trial, args), ["--dtype", "float32"])


def _try(trial: Trial, args: argparse.Namespace) -> int:
    if args.only is not None:
        return _run_one(trial.endpoint, args)
    result = asyncio.run(run_fuzz(trial.endpoint, trial.pid, args))
    problems = judge(result, trial.log or args.log, args)
    tally: Tally = result["tally"]
    return conclude(
        args, "fuzz", problems, good="nothing hurt", max_shown=MAX_FAILURES,
        more=f"; seed {args.seed}, {tally.num_sent:,} cases, {tally.seen.num_streams} streams "
        "beside them",
        packages=["pyserve", "aiohttp"],
        wall_s=result["wall_s"], rss_bytes=result["rss_bytes"], statuses=tally.statuses,
        num_streams=tally.seen.num_streams, max_gap_s=tally.seen.max_gap_s,
        max_first_s=tally.seen.max_first_s, slowest_s=tally.suspects.slowest_s,
    )  # fmt: skip


def _run_one(endpoint: Endpoint, args: argparse.Namespace) -> int:
    case = make_case(args.seed, args.only, args.family)
    print(f"case {case.title}\nsent {_shown(case.request)}")
    _, problem, received = asyncio.run(run_case(endpoint, case))
    print(f"came {_shown(received)}\n{problem or 'nothing wrong'}")
    return 1 if problem else 0


def _parser() -> argparse.ArgumentParser:
    parser = server_parser(__doc__)
    add = parser.add_argument
    add("-n", "--num-cases", type=int, default=20_000)
    add("-c", "--concurrency", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--only", type=int, metavar="NUMBER", help="send this case alone and show its answer")
    add("--family", choices=FAMILIES, help="cases of this kind alone")
    add("--max-growth-mib", type=float, default=16.0, help="fail above (default %(default)s)")
    add("--max-gap-s", type=float, default=5.0, help="fail above (default %(default)s)")
    add("--max-first-s", type=float, default=5.0, help="of a first token (default %(default)s)")
    add("--max-answer-s", type=float, default=ANSWER_TIMEOUT_S, help="(default %(default)s)")
    add("--max-health-s", type=float, default=1.0, help="fail above (default %(default)s)")
    add("--log", type=Path, help="its log, looked through for tracebacks, with --url")
    return parser


if __name__ == "__main__":
    sys.exit(main())
