"""A server that sleeps and wakes up: what it leaves on the card, and how soon it answers again.

    python -m bench.make_model llama-3.1-8b /tmp/llama --weights
    python -m bench.sleep_wake --model /tmp/llama -- --device cuda

What follows `--` goes to `python -m pyserve`; without --model the demo model is served. The start
reads the weights, so that every wake-up finds them in the page cache. Each time a request waits
while the server sleeps; its first token counts from the POST of /wake_up, and its answer has to be
what it was before. The exit code says whether all were, and whether no memory was taken from the
card after a wake-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bench.report import busy_remark
from bench.server_process import ServerProcess, card_mib, memory_of, running_server

READY_TIMEOUT_S = 300.0
TIMEOUT_S = 120.0
LOOK_S = 0.01
LEVELS = (1, 2)
MAX_TOKENS = 32
PROMPT_TOKENS = 64


@dataclass(slots=True)
class Cycles:
    """Of one level; seconds, and bytes."""

    sleep_s: list[float] = field(default_factory=list)
    wake_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    card_bytes: list[int] = field(default_factory=list)
    host_bytes: list[int] = field(default_factory=list)


class Waiting:
    """A request in flight on a thread of its own."""

    def __init__(self, server: ServerProcess) -> None:
        self.text = ""
        self.first_token_s = 0.0  # as time.perf_counter tells it
        self._server = server
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def end(self) -> str:
        """Its answer. RuntimeError where there is none."""
        self._thread.join(TIMEOUT_S)
        if not self.first_token_s or self._thread.is_alive():
            raise RuntimeError("a request was not answered")
        return self.text

    def _read(self) -> None:
        with post(
            self._server, "/v1/completions", prompt=[[*range(5, 5 + PROMPT_TOKENS)]],
            max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True, stream=True, cache_salt="waits",
        ) as response:  # fmt: skip
            for line in response:
                if line.startswith(b"data: {"):
                    self.first_token_s = self.first_token_s or time.perf_counter()
                    choices = json.loads(line[6:]).get("choices", [])
                    self.text += "".join(choice["text"] for choice in choices)


def post(server: ServerProcess, path: str, **body: Any) -> Any:
    """The open response; HTTPError where it is none."""
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def metric(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=TIMEOUT_S) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def used_on_cards() -> int:
    """Bytes, by everybody; 0 where there is no card."""
    with suppress(RuntimeError):
        return card_mib() * 2**20
    return 0


def timed_post(server: ServerProcess, path: str) -> float:
    """Seconds until the answer."""
    began_s = time.perf_counter()
    post(server, path).close()
    return time.perf_counter() - began_s


def cycle(server: ServerProcess, level: int, expected: str, others: int, into: Cycles) -> str:
    """Sleep, wake up, answer; what is wrong, or nothing."""
    into.sleep_s.append(timed_post(server, f"/sleep?level={level}"))
    into.card_bytes.append(used_on_cards() - others)
    into.host_bytes.append(memory_of(server.pid).rss_bytes)
    waiting = Waiting(server)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not metric(server, "vllm:num_requests_waiting") and time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
    began_s = time.perf_counter()
    into.wake_s.append(timed_post(server, "/wake_up"))
    num_allocations = metric(server, "pyserve:device_allocations")
    answer = waiting.end()
    into.first_token_s.append(waiting.first_token_s - began_s)
    again = Waiting(server).end()
    if answer != expected or again != expected:
        return f"level {level}: another answer than before"
    taken = metric(server, "pyserve:device_allocations") - num_allocations
    return f"level {level}: {taken:.0f} allocations on the card after waking up" if taken else ""


def report(level: int, cycles: Cycles) -> str:
    def seconds(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} s (at most {max(values):.2f})"

    return (
        f"= level {level}, {len(cycles.sleep_s)} times: {max(cycles.card_bytes) / 1e9:.2f} GB on "
        f"the card asleep, host {max(cycles.host_bytes) / 1e9:.2f} GB; asleep after "
        f"{seconds(cycles.sleep_s)}, awake after {seconds(cycles.wake_s)}, first token of a "
        f"waiting request after {seconds(cycles.first_token_s)}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder; default: the demo model")
    parser.add_argument("--times", type=int, default=3, help="of each level (default: 3)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of the server")
    args = parser.parse_args(argv)
    if remark := busy_remark():
        print(remark, flush=True)
    flags = ["--model", args.model, *args.flags] if args.model else args.flags
    others, wrong = used_on_cards(), list[str]()
    with running_server(flags) as server:
        ready_s = server.wait_ready(READY_TIMEOUT_S).ready_s
        expected = Waiting(server).end()
        awake, host = used_on_cards() - others, memory_of(server.pid).rss_bytes
        print(f"= ready after {ready_s:.1f} s: {awake / 1e9:.2f} GB on the card, host "
              f"{host / 1e9:.2f} GB")  # fmt: skip
        for level in LEVELS:
            cycles = Cycles()
            for _ in range(args.times):
                wrong.append(cycle(server, level, expected, others, cycles))
            print(report(level, cycles), flush=True)
        awake = used_on_cards() - others
        print(f"= awake at the end: {awake / 1e9:.2f} GB on the card")
        print("\n".join(line for line in server.log.read_text().splitlines() if "loaded" in line))
    for line in filter(None, wrong):
        print(f"= {line}")
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
