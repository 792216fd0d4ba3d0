"""Does it leak, does it starve anyone? Mixed requests with aborts, or many equal streams.

    python -m bench.soak                      # 2,000 mixed requests, 20 % aborted
    python -m bench.soak --streams 64 --exact # 64 streams against answers taken one by one
    python -m bench.soak --url http://localhost:8000 --pid 1234
    python -m bench.soak --seconds 180 --device-memory -- --device cuda

Without --url a server is started (flags after `--` go to it). Exit code 1 where a check fails:
a request failed, something still runs or holds KV blocks afterwards, memory grew, an answer
differs, a stream stood still for too long. With --device-memory also where the GPU's memory in use
has changed, or the server has taken memory from it, since it was ready.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.report import (
    LATENCY_HEADER,
    format_table,
    latency_row,
    summarize,
)
from bench.server_process import card_mib, memory_of
from bench.trial import Trial, conclude, server_parser, try_server
from pyserve.http_client import Connection, Endpoint, Reply, fetch, read_whole
from pyserve.remote.workload import WORDS

MAX_CONCURRENCY = 64
PARTS = 5
MIB = 2**20
TIMEOUT_S = 300.0
IDLE_TIMEOUT_S = 10.0
DEVICE_ALLOCATIONS = "pyserve:device_allocations"
# Without --exact this share of streams may differ: a tie between two bfloat16 logits falls
# differently in another batch, and everything after it with it.
TIE_SHARE = 0.1
QUESTIONS = (
    "Hello!", "What is the capital of France?", "La capital de Francia es", "How are you?",
    "What is 7 + 5?", "Write a short poem about the sea.", "¿Cuál es la capital de Japón?",
    "Explain gravity.", "Hola, ¿qué tal?", "What is 12 * 3?", "Thank you!",
    "A car travels 120 km in 1.5 h. What is its speed in m/s?", "What is the capital of Peru?",
    "Explica la fotosíntesis.", "Who are you?", "Repeat after me: blue green red",
)  # fmt: skip


@dataclass(slots=True)
class Tally:
    """What has happened to the requests of a soak."""

    num_sent: int = 0
    num_complete: int = 0
    num_aborted: int = 0
    output_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    mean_s: float = 0.2  # running mean of an answer's duration: aborts are spread over it

    def add(self, reply: Reply, body: dict[str, Any]) -> None:
        """Check a finished answer and count it."""
        if not body["stream"]:
            read_whole(reply)
        problem = reply.error or _problem(reply, body)
        if problem is not None:
            self.failures[problem] += 1
            return
        self.num_complete += 1
        self.output_tokens += reply.num_output_tokens
        self.mean_s += 0.05 * (reply.ended_s - reply.started_s - self.mean_s)


def _problem(reply: Reply, body: dict[str, Any]) -> str | None:
    """What is wrong with an answer that came without an error; None: nothing."""
    wanted = set(range(body["n"]))
    if set(reply.finish_reasons) != wanted:
        return f"choices {sorted(reply.finish_reasons)} have ended, asked for {len(wanted)}"
    unknown = set(reply.finish_reasons.values()) - {"stop", "length"}
    if unknown:
        return f"finish reason {sorted(unknown)}"
    if reply.usage is None:
        return "no usage"
    low, high = body["n"], body["n"] * body["max_tokens"]
    if not low <= reply.usage.completion_tokens <= high:
        return "completion_tokens out of [n, n * max_tokens]"
    return None


def mixed_request(rng: np.random.Generator, vocab_size: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a random request: endpoint, form of prompt, sampling, length, stops."""
    num_words = int(rng.choice([2, 20, 100, 300]))
    words = " ".join(rng.choice(WORDS, num_words))
    max_tokens = int(rng.integers(1, 65))
    temperature = float(rng.choice([0.0, 0.7, 1.3]))
    body: dict[str, Any] = {
        "max_tokens": max_tokens,
        # n greedy answers would be one answer: servers refuse that.
        "n": int(rng.integers(1, 4)) if temperature > 0 else 1,
        "temperature": temperature,
        "stream": bool(rng.random() < 0.6),
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    options: list[tuple[float, dict[str, Any]]] = [
        (0.3, {"seed": int(rng.integers(0, 2**31))}),
        (0.3, {"top_p": 0.9}),
        (0.2, {"top_k": 20}),
        (0.2, {"min_p": 0.05}),
        (0.2, {"repetition_penalty": 1.2}),
        (0.2, {"presence_penalty": 0.5, "frequency_penalty": 0.5}),
        (0.2, {"logit_bias": {str(rng.integers(0, vocab_size)): -50}}),
        (0.3, {"stop": ["e", ". "]}),
        (0.3, {"ignore_eos": True}),
        (0.2, {"min_tokens": max_tokens // 2}),
    ]
    for share, fields in options:
        if rng.random() < share:
            body.update(fields)
    kind = rng.choice(["chat", "text", "ids"])
    if kind == "chat":
        question = str(rng.choice(QUESTIONS))
        content = question if rng.random() < 0.5 else words
        body["messages"] = [{"role": "user", "content": content}]
        return "/v1/chat/completions", body
    body["prompt"] = words if kind == "text" else rng.integers(0, vocab_size, num_words).tolist()
    return "/v1/completions", body


async def soak(
    endpoint: Endpoint, tally: Tally, rng: np.random.Generator, args: argparse.Namespace, share: int
) -> None:
    """One of PARTS parts, from `args.concurrency` slots: `share` requests, or its share of time."""
    deadline_s = time.perf_counter() + args.seconds / PARTS if args.seconds else None
    remaining = iter(range(share)) if deadline_s is None else itertools.count()

    async def slot() -> None:
        for _ in remaining:
            if deadline_s is not None and time.perf_counter() > deadline_s:
                return
            path, body = mixed_request(rng, args.vocab_size)
            tally.num_sent += 1
            # Answers that end before their abort are made up for by aborting more.
            debt = args.abort_share * (tally.num_sent - args.concurrency) - tally.num_aborted
            is_aborted = debt > 0 or rng.random() < args.abort_share
            delay_s = rng.uniform(0.0, 1.2) * tally.mean_s if is_aborted else None
            request = endpoint.encode("POST", path, body)
            reply = await send(endpoint, request, abort_after_s=delay_s)
            if reply is None:
                tally.num_aborted += 1
            else:
                tally.add(reply, body)

    await asyncio.gather(*(slot() for _ in range(args.concurrency)))


Part = Callable[[Endpoint, Tally, np.random.Generator, argparse.Namespace, int], Awaitable[None]]


async def send(
    endpoint: Endpoint, request: bytes, *, abort_after_s: float | None = None
) -> Reply | None:
    """One exchange on a connection of its own; None where its socket was closed before the end."""
    started_s = time.perf_counter()
    try:
        connection = await Connection.open(endpoint, has_text=True)
    except OSError as error:
        return Reply(started_s, ended_s=time.perf_counter(), error=f"cannot connect: {error}")
    exchange = asyncio.ensure_future(
        connection.exchange(request, started_s=started_s, timeout_s=TIMEOUT_S)
    )
    done, _ = await asyncio.wait([exchange], timeout=abort_after_s)
    if not done:
        exchange.cancel()
    await asyncio.wait([exchange])
    connection.close()
    return None if exchange.cancelled() else exchange.result()


async def metrics(endpoint: Endpoint) -> dict[str, float]:
    """Every sample of /metrics, summed over its labels."""
    reply = await fetch(endpoint, "/metrics")
    if reply.error is not None:
        raise RuntimeError(f"/metrics: {reply.error}")
    values: dict[str, float] = {}
    for line in reply.body.decode().splitlines():
        match = re.match(r"([A-Za-z_:][\w:]*)(?:\{.*\})? (\S+)", line)
        if match:
            values[match[1]] = values.get(match[1], 0.0) + float(match[2])
    return values


async def wait_idle(endpoint: Endpoint) -> dict[str, float]:
    """What is still held once nothing is, or after IDLE_TIMEOUT_S: all zero means idle."""
    deadline_s = time.perf_counter() + IDLE_TIMEOUT_S
    while True:
        values = await metrics(endpoint)
        usage = values.get("vllm:kv_cache_usage_perc", values.get("vllm:gpu_cache_usage_perc"))
        if usage is None or "vllm:num_requests_running" not in values:
            raise RuntimeError("/metrics has no vllm:num_requests_running or KV cache usage")
        held = {
            "requests running": values["vllm:num_requests_running"],
            "requests waiting": values["vllm:num_requests_waiting"],
            "KV cache usage": usage,
        }
        if not any(held.values()) or time.perf_counter() > deadline_s:
            return held
        await asyncio.sleep(0.01)


async def run_soak(
    endpoint: Endpoint, pid: int | None, args: argparse.Namespace, part: Part = soak
) -> dict[str, Any]:
    """PARTS equal parts, memory read after each; growth is counted from the end of args.warm_parts.

    The device's memory is read before the first request too: nothing may be allocated after ready.
    """
    rng = np.random.default_rng(args.seed)
    tally = Tally()
    parts = [len(part) for part in np.array_split(np.arange(args.num_requests), PARTS)]
    rss_bytes: list[int] = []
    device = [await read_device(endpoint)] if args.device_memory else []
    held: dict[str, float] = {}
    idle_s: list[float] = []
    started_s = time.perf_counter()
    for share in parts:
        await part(endpoint, tally, rng, args, share)
        ended_s = time.perf_counter()
        held = await wait_idle(endpoint)
        idle_s.append(time.perf_counter() - ended_s)
        if pid is not None:
            rss_bytes.append(memory_of(pid).rss_bytes)
        if args.device_memory:
            device.append(await read_device(endpoint))
    return {
        "wall_s": time.perf_counter() - started_s,
        "num_complete": tally.num_complete,
        "num_aborted": tally.num_aborted,
        "output_tokens": tally.output_tokens,
        "failures": dict(tally.failures),
        "held_at_end": held,
        "max_idle_s": max(idle_s),
        "rss_bytes": rss_bytes,
        "growth_bytes": rss_bytes[-1] - rss_bytes[args.warm_parts - 1] if rss_bytes else None,
        "device_allocations": [allocations for allocations, _ in device],
        "device_mib": [mib for _, mib in device],
    }


async def read_device(endpoint: Endpoint) -> tuple[float, int]:
    """How often the server has taken memory from the GPU, and MiB in use on it, by everybody.

    RuntimeError where one of them cannot be read.
    """
    allocations = (await metrics(endpoint)).get(DEVICE_ALLOCATIONS)
    if allocations is None:
        raise RuntimeError(f"/metrics has no {DEVICE_ALLOCATIONS}")
    return allocations, card_mib()


def judge_soak(result: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Print the figures; returns what is wrong."""
    print(
        format_table(
            [
                ["soak", ""],
                ["requests complete", f"{result['num_complete']:,}"],
                ["aborted by closing the socket", f"{result['num_aborted']:,}"],
                ["failed", str(sum(result["failures"].values()))],
                ["output tokens", f"{result['output_tokens']:,}"],
                ["wall s", f"{result['wall_s']:.1f}"],
                ["last answer to idle, slowest, s", f"{result['max_idle_s']:.3f}"],
                *([name, f"{value:g}"] for name, value in result["held_at_end"].items()),
            ]
        )
    )
    problems = [f"{count} requests: {text}" for text, count in result["failures"].items()]
    problems += [f"{name}: {value:g}" for name, value in result["held_at_end"].items() if value]
    problems += judge_device(result, args)
    if result["growth_bytes"] is None:
        print("server memory was not read: pass --pid")
        return problems
    series = " ".join(f"{value / MIB:.1f}" for value in result["rss_bytes"])
    growth_mib = result["growth_bytes"] / MIB
    print(
        f"server RSS MiB after each fifth of the requests: {series}; "
        f"growth since number {args.warm_parts} {growth_mib:+.2f} MiB "
        f"(limit {args.max_growth_mib:g})"
    )
    if growth_mib > args.max_growth_mib:
        problems.append(f"memory grew by {growth_mib:.2f} MiB")
    return problems


def judge_device(result: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Print what the GPU showed before the first request and after each part; what is wrong."""
    allocations, mib = result["device_allocations"], result["device_mib"]
    if not allocations:
        return []
    print(
        f"device allocations: {' '.join(f'{value:g}' for value in allocations)}; "
        f"GPU memory in use, MiB: {' '.join(map(str, mib))}"
    )
    problems = []
    if allocations[-1] != allocations[0]:
        problems.append(f"{allocations[-1] - allocations[0]:g} device allocations after ready")
    if abs(mib[-1] - mib[0]) > args.max_device_growth_mib:
        problems.append(f"GPU memory in use went from {mib[0]} to {mib[-1]} MiB")
    return problems


async def run_streams(endpoint: Endpoint, args: argparse.Namespace) -> dict[str, Any]:
    """Answers one by one, then `args.streams` at once; greedy, the questions in turn."""
    requests = []
    for question in QUESTIONS:
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": args.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        requests.append(endpoint.encode("POST", "/v1/chat/completions", body))
    expected = []
    for request in requests:
        reply = await send(endpoint, request)
        if reply is None or reply.error is not None:
            raise RuntimeError(f"one stream alone fails: {reply.error if reply else 'aborted'}")
        expected.append(reply.texts[0])
    turns = [number % len(requests) for number in range(args.streams)]
    replies = await asyncio.gather(*(send(endpoint, requests[turn]) for turn in turns))
    held = await wait_idle(endpoint)
    good = [reply for reply in replies if reply is not None and reply.error is None]
    failures = Counter(str(reply.error) for reply in replies if reply and reply.error is not None)
    different = [
        (QUESTIONS[turn], expected[turn], reply.texts[0])
        for turn, reply in zip(turns, replies, strict=True)
        if reply is not None and reply.error is None and reply.texts[0] != expected[turn]
    ]
    max_gaps = [max(np.diff(r.chunk_times), default=0.0) for r in good]
    wall_s = max(r.ended_s for r in replies if r) - min(r.started_s for r in replies if r)
    return {
        "num_streams": len(replies),
        "num_equal": len(good) - len(different),
        "different": different,
        "failures": dict(failures),
        "held_at_end": held,
        "output_tokens": sum(r.num_output_tokens for r in good),
        "wall_s": wall_s,
        "ttft_s": summarize([r.chunk_times[0] - r.started_s for r in good]),
        "max_gap_s": summarize([float(gap) for gap in max_gaps]),
        "e2e_s": summarize([r.ended_s - r.started_s for r in good]),
    }


def judge_streams(result: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Print the figures; returns what is wrong."""
    print(
        f"{result['num_equal']} of {result['num_streams']} streams equal the answer taken alone; "
        f"{result['output_tokens']:,} tokens in {result['wall_s']:.2f} s"
    )
    print(
        format_table(
            [
                LATENCY_HEADER,
                latency_row("TTFT", result["ttft_s"]),
                latency_row("longest gap of a stream", result["max_gap_s"]),
                latency_row("request", result["e2e_s"]),
            ]
        )
    )
    problems = [f"{count} streams: {text}" for text, count in result["failures"].items()]
    problems += [f"{name}: {value:g}" for name, value in result["held_at_end"].items() if value]
    for question, alone, together in result["different"][:5]:
        print(f"differs: {question!r}: alone {alone!r}, together {together!r}")
    allowed = 0 if args.exact else int(TIE_SHARE * result["num_streams"])
    if len(result["different"]) > allowed:
        problems.append(f"{len(result['different'])} streams differ, {allowed} may")
    longest_s = result["max_gap_s"]["max"] if result["max_gap_s"] else 0.0
    if longest_s > args.max_gap_s:
        problems.append(f"a stream stood still for {longest_s:.2f} s (limit {args.max_gap_s:g})")
    return problems


def main(argv: list[str] | None = None) -> int:
    """0: every check passed; 1: one failed or the server could not be reached."""
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    if not 1 <= args.concurrency <= MAX_CONCURRENCY:
        parser.error(f"--concurrency must be in [1, {MAX_CONCURRENCY}], got {args.concurrency}")
    if args.num_requests < 10:
        parser.error(f"--num-requests must be at least 10, got {args.num_requests}")
    return try_server(args, lambda trial: _run(trial, args))


def _run(trial: Trial, args: argparse.Namespace) -> int:
    if args.streams:
        result = asyncio.run(run_streams(trial.endpoint, args))
        problems = judge_streams(result, args)
    else:
        result = asyncio.run(run_soak(trial.endpoint, trial.pid, args))
        problems = judge_soak(result, args)
    return conclude(
        args, "soak", problems, good="nothing leaked", more=_figures(result), result=result
    )


def _figures(result: dict[str, Any]) -> str:
    """The soak in a line."""
    if "num_complete" not in result:
        return ""
    growth = result["growth_bytes"]
    return (
        f"; {result['num_complete']:,} complete, {result['num_aborted']:,} aborted, "
        f"{result['output_tokens']:,} tokens in {result['wall_s']:.0f} s, RSS "
        f"{'not read' if growth is None else f'{growth / MIB:+.1f} MiB'}, device allocations "
        f"{' '.join(f'{n:g}' for n in result['device_allocations']) or 'not read'}"
    )


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """As bench.hostile_soak has it too."""
    parser = server_parser(description)
    parser.set_defaults(warm_parts=1)  # allocators fill up: growth is counted from their end
    add = parser.add_argument
    add("--api-key")
    add("-n", "--num-requests", type=int, default=2000)
    add("--seconds", type=float, help="so long instead of so many requests")
    add("-c", "--concurrency", type=int, default=32, help=f"at most {MAX_CONCURRENCY}")
    add("--abort-share", type=float, default=0.2)
    add("--vocab-size", type=int, default=256, help="token ids are below")
    add("--seed", type=int, default=0)
    add("--max-growth-mib", type=float, default=16.0, help="fail above (default %(default)s)")
    add("--device-memory", action="store_true", help="watch the GPU; it should serve nobody else")
    add("--max-device-growth-mib", type=int, default=2, help="fail above (default %(default)s)")
    add("--streams", type=int, default=0, help="that many concurrent streams instead of the soak")
    add("--max-tokens", type=int, default=64, help="of a stream")
    add("--exact", action="store_true", help="every stream must equal its answer (float32)")
    add("--max-gap-s", type=float, default=2.0, help="fail above (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
