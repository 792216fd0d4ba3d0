"""More than a server can do: do those it takes get what they got before, and the others a 429?

    python -m bench.overload --seconds 120

Starts `python -m pyserve` with few slots and a short queue (what follows `--` is added), or takes
--url and --pid. First a closed loop with as many clients as the server takes at once (slots plus
queue): full, and nobody is refused. Its rate is the server's capacity. Then Poisson arrivals at
`--factor` times that rate, each a client that does not come again. Fails where an accepted request
does not end whole or its time to first token grows, where a refusal is not a 429 with Retry-After,
where the server's memory grows or its event loop is late.

All clients run in this process; at ten times the capacity it takes most of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import msgspec
import numpy as np

from bench.report import (
    LATENCY_HEADER,
    busy_remark,
    format_table,
    latency_row,
    summarize,
)
from bench.server_process import memory_of
from bench.trial import Trial, conclude, server_parser, try_server
from pyserve.http_client import Connection, Endpoint, Reply, fetch

MIB = 2**20
POLL_S = 0.2
TIMEOUT_S = 120.0
SETTLE_SHARE = 0.2  # of a phase: memory is compared from then on
PATH = "/v1/completions"
NUM_REQUESTS = 4096  # different ones


@dataclass(slots=True)
class Phase:
    """What one load has come to."""

    seconds: float = 0.0
    first_token_s: list[float] = field(default_factory=list)
    token_gap_s: list[float] = field(default_factory=list)  # mean of each request
    refusal_s: list[float] = field(default_factory=list)
    retry_after_s: Counter[int] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    rss_bytes: list[int] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    loop_lag_s: float = 0.0
    late_s: float = 0.0  # how late this bench sent a request, at worst

    @property
    def num_accepted(self) -> int:
        return len(self.first_token_s)

    @property
    def growth_bytes(self) -> int:
        """Of the server's memory, from the first fifth of the phase on."""
        settled = self.rss_bytes[int(len(self.rss_bytes) * SETTLE_SHARE) :]
        return settled[-1] - settled[0] if settled else 0

    def add(self, reply: Reply) -> None:
        if reply.status == 429:
            self.refusal_s.append(reply.ended_s - reply.started_s)
            if not reply.retry_after_s:
                self.problems["a 429 without Retry-After"] += 1
            self.retry_after_s[reply.retry_after_s or 0] += 1
        elif reply.error is not None:
            self.problems[reply.error[:100]] += 1
        elif not reply.chunk_times or reply.finish_reasons.get(0) != "length":
            self.problems["an accepted request without its end"] += 1
        else:
            times = reply.chunk_times
            self.first_token_s.append(times[0] - reply.started_s)
            self.token_gap_s.append((times[-1] - times[0]) / max(len(times) - 1, 1))


class Load:
    """Requests from one seed, on connections that are kept."""

    def __init__(self, endpoint: Endpoint, args: argparse.Namespace) -> None:
        self._endpoint = endpoint
        self._rng = np.random.default_rng(args.seed)
        self._idle: list[Connection] = []
        # Made ahead, as this process shares the machine with the server.
        self._requests = itertools.cycle([self._encode(args) for _ in range(NUM_REQUESTS)])

    async def closed(self, concurrency: int, seconds: float, phase: Phase) -> None:
        """`concurrency` clients, each of which asks again when it has its answer."""
        ends_s = time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < ends_s:
                phase.add(await self._send(time.perf_counter()))

        await asyncio.gather(*(client() for _ in range(concurrency)))

    async def open(self, rate: float, seconds: float, phase: Phase) -> None:
        """Poisson arrivals, whatever has become of those before."""
        due_s = time.perf_counter()
        ends_s = due_s + seconds
        tasks: set[asyncio.Task[None]] = set()

        async def client(started_s: float) -> None:
            phase.late_s = max(phase.late_s, time.perf_counter() - started_s)
            phase.add(await self._send(started_s))

        while due_s < ends_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            task = asyncio.create_task(client(due_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_s += float(self._rng.exponential(1.0 / rate))
        await asyncio.gather(*tasks)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _encode(self, args: argparse.Namespace) -> bytes:
        body = {
            "prompt": self._rng.integers(5, args.vocab_size, args.input_len).tolist(),
            "max_tokens": args.output_len, "ignore_eos": True, "temperature": 0, "stream": True,
        }  # fmt: skip
        return self._endpoint.encode("POST", PATH, body)

    async def _send(self, started_s: float) -> Reply:
        request = next(self._requests)
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                break
        else:
            try:
                connection = await Connection.open(self._endpoint)
            except OSError as error:
                return Reply(started_s, error=f"cannot connect: {error}")
        reply = await connection.exchange(request, started_s=started_s, timeout_s=TIMEOUT_S)
        if connection.is_usable:
            self._idle.append(connection)
        return reply


async def watch(endpoint: Endpoint, pid: int | None, phase: Phase) -> None:
    """Memory and /health until cancelled."""
    while True:
        reply = await fetch(endpoint, "/health")
        if reply.status != 200:
            phase.problems[f"/health: {reply.error}"] += 1
        else:
            phase.health_s.append(reply.ended_s - reply.started_s)
            lag_s = msgspec.json.decode(reply.body).get("loop_lag_s", 0.0)
            phase.loop_lag_s = max(phase.loop_lag_s, lag_s)
        if pid is not None:
            phase.rss_bytes.append(memory_of(pid).rss_bytes)
        await asyncio.sleep(POLL_S)


async def run(endpoint: Endpoint, pid: int | None, args: argparse.Namespace) -> list[Phase]:
    """The full load, then the overload."""
    load = Load(endpoint, args)
    try:
        await load.closed(4, args.warm_up_seconds, Phase())
        return await _run(load, endpoint, pid, args)
    finally:
        load.close()
        await asyncio.sleep(0)  # the transports' own ends


async def _run(
    load: Load, endpoint: Endpoint, pid: int | None, args: argparse.Namespace
) -> list[Phase]:
    full, over = Phase(), Phase()
    rate = 0.0
    for phase in (full, over):
        watcher = asyncio.create_task(watch(endpoint, pid, phase))
        began_s = time.perf_counter()
        if phase is full:
            await load.closed(args.max_num_seqs + args.max_queue, args.full_seconds, phase)
        else:
            await load.open(rate, args.seconds, phase)
        phase.seconds = time.perf_counter() - began_s
        watcher.cancel()
        await asyncio.wait([watcher])
        if not watcher.cancelled() and watcher.exception() is not None:
            raise RuntimeError(f"the server is gone: {watcher.exception()}")
        rate = args.factor * phase.num_accepted / phase.seconds
        if not rate:
            raise RuntimeError(f"no request was answered: {dict(phase.problems)}")
    return [full, over]


def judge(full: Phase, over: Phase, args: argparse.Namespace) -> list[str]:
    """What is wrong."""
    problems = [f"{text}: {count}" for text, count in (full.problems + over.problems).items()]
    if full.refusal_s:
        problems.append(f"{len(full.refusal_s)} requests refused within the limit")
    if not over.refusal_s:
        problems.append("nobody was refused: this was no overload")
    for percent in (50, 95):
        before, after = (np.percentile(p.first_token_s, percent) for p in (full, over))
        if after > args.max_ratio * before:
            problems.append(
                f"p{percent} of the time to first token: {1e3 * after:.0f} ms, "
                f"{1e3 * before:.0f} ms before the overload"
            )
    if over.growth_bytes > args.max_growth_mib * MIB:
        problems.append(f"memory grew by {over.growth_bytes / MIB:.1f} MiB")
    if over.loop_lag_s > args.max_lag_s:
        problems.append(f"the event loop was late by {1e3 * over.loop_lag_s:.0f} ms")
    return problems


def render(full: Phase, over: Phase) -> str:
    rows = [LATENCY_HEADER]
    for name, phase in (("full", full), ("overload", over)):
        rows.append(latency_row(f"{name}: time to first token", summarize(phase.first_token_s)))
        rows.append(latency_row(f"{name}: time per token", summarize(phase.token_gap_s)))
        rows.append(latency_row(f"{name}: /health", summarize(phase.health_s)))
    rows.append(latency_row("overload: time to the 429", summarize(over.refusal_s)))
    lines = [format_table(rows)]
    for name, phase in (("full", full), ("overload", over)):
        lines.append(
            f"{name}: {phase.num_accepted} accepted ({phase.num_accepted / phase.seconds:.1f}/s), "
            f"{len(phase.refusal_s)} refused ({len(phase.refusal_s) / phase.seconds:.1f}/s) in "
            f"{phase.seconds:.0f} s; loop late by {1e3 * phase.loop_lag_s:.0f} ms at most; "
            f"memory {phase.growth_bytes / MIB:+.1f} MiB; sent late by {1e3 * phase.late_s:.0f} ms "
            "at most"
        )
    seconds = ", ".join(f"{s} s: {count}" for s, count in sorted(over.retry_after_s.items()))
    lines.append(f"Retry-After: {seconds}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0: every check passed; 1: one failed or the server could not be reached."""
    args = _parser().parse_args(argv)
    limits = ["--max-num-seqs", str(args.max_num_seqs), "--max-queue", str(args.max_queue)]
    print(busy_remark(), end="")
    return try_server(args, lambda trial: _try(trial, args), limits)


def _try(trial: Trial, args: argparse.Namespace) -> int:
    full, over = asyncio.run(run(trial.endpoint, trial.pid, args))
    print(render(full, over))
    result = {"full": full, "over": over}
    problems = judge(full, over, args)
    return conclude(args, "overload", problems, good="as it should be", result=result)


def _parser() -> argparse.ArgumentParser:
    parser = server_parser(__doc__)
    add = parser.add_argument
    add("--api-key")
    add("--seconds", type=float, default=120.0, help="of overload (default %(default)g)")
    add("--warm-up-seconds", type=float, default=1.0)
    add("--full-seconds", type=float, default=20.0, help="of the load before it")
    add("--factor", type=float, default=10.0, help="arrivals, times the capacity")
    add("--max-num-seqs", type=int, default=16, help="slots of the server")
    add("--max-queue", type=int, default=16, help="its queue")
    add("--input-len", type=int, default=32)
    add("--output-len", type=int, default=64)
    add("--vocab-size", type=int, default=256, help="token ids are below")
    add("--seed", type=int, default=0)
    add("--max-ratio", type=float, default=1.25, help="time to first token, overload to full")
    add("--max-growth-mib", type=float, default=16.0)
    add("--max-lag-s", type=float, default=0.1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
