"""An innocent neighbour of hostile clients: streams that stay exact, a /health that answers.

It lives in a process of its own: where a hostile client has to read 30 MB, the loop and the lock of
its process stand still for a second, which was taken for the server's.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import multiprocessing
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from bench.soak import send
from pyserve.http_client import Endpoint

QUESTIONS = ("What is the capital of France?", "Escribe un poema", "Explain gravity.")
NUM_TOKENS = 64
HEALTH_PAUSE_S = 0.1
MAX_PROBLEMS = 20
MAX_GAPS = 10
MIN_GAP_S = 0.02
TICK_S = 0.02


@dataclass(frozen=True, slots=True)
class Gap:
    """While a stream stood still.

    began_s, ended_s  of time.perf_counter, which is one clock for all processes of a machine.
    late_s            at most, by which the neighbour's own process was woken late meanwhile: then
                      it is the machine that was busy.
    number            of the token that came at its end; 0: the stream had to wait for its turn.
    """

    began_s: float
    ended_s: float
    late_s: float
    number: int

    @property
    def length_s(self) -> float:
        return self.ended_s - self.began_s


@dataclass(slots=True)
class Seen:
    """What the neighbour has seen so far.

    gaps  the longest within streams and the longest before their first tokens, the longest first.
    """

    num_streams: int = 0
    gaps: list[Gap] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def max_gap_s(self) -> float:
        """Between two tokens."""
        return max((gap.length_s for gap in self.gaps if gap.number), default=0.0)

    @property
    def max_first_s(self) -> float:
        """Before the first token of a stream."""
        return max((gap.length_s for gap in self.gaps if not gap.number), default=0.0)

    def add_gaps(self, gaps: list[Gap]) -> None:
        longest = sorted([*self.gaps, *gaps], key=lambda gap: -gap.length_s)
        firsts = [gap for gap in longest if not gap.number][:MAX_GAPS]
        others = [gap for gap in longest if gap.number][:MAX_GAPS]
        self.gaps = sorted(firsts + others, key=lambda gap: -gap.length_s)

    def blame(self, problem: str) -> None:
        if not self.has_enough:
            self.problems.append(problem)

    def add(self, other: Seen) -> None:
        """What was seen since the last time."""
        self.num_streams += other.num_streams
        self.add_gaps(other.gaps)
        self.health_s += other.health_s
        for problem in other.problems:
            self.blame(problem)

    @property
    def has_enough(self) -> bool:
        return len(self.problems) >= MAX_PROBLEMS


class Neighbour:
    """Streams and asks /health in another process, and adds to `seen` what that sees."""

    def __init__(self, endpoint: Endpoint, seen: Seen) -> None:
        self._seen = seen
        context = multiprocessing.get_context("spawn")
        self._pipe, self._other_end = context.Pipe()
        self._process = context.Process(target=_live, args=(endpoint, self._other_end), daemon=True)
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """RuntimeError where one stream alone fails."""
        self._process.start()
        self._other_end.close()
        error = await asyncio.to_thread(self._receive)
        if error is not None:
            raise RuntimeError(f"one stream alone fails: {error}")
        self._reader = asyncio.create_task(asyncio.to_thread(self._read))

    async def stop(self) -> None:
        assert self._reader is not None, "not started"
        try:
            self._pipe.send(None)
        except OSError:
            pass  # it has died, which the reader says
        await self._reader
        await asyncio.to_thread(self._process.join)
        self._pipe.close()

    def _receive(self) -> Seen | str | None:
        try:
            received: Seen | str | None = self._pipe.recv()
        except EOFError:
            return "the neighbour's process has died"
        return received

    def _read(self) -> None:
        while (received := self._receive()) is not None:
            if isinstance(received, str):
                self._seen.blame(received)
                return
            self._seen.add(received)


def _live(endpoint: Endpoint, pipe: Connection) -> None:
    """What the process does: say None or an error, then what it sees until told to stop, None."""
    try:
        asyncio.run(_Streams(endpoint, pipe).run())
    except (OSError, RuntimeError) as error:
        pipe.send(str(error))


class _Streams:
    """Greedy streams of known prompts, one after the other, each compared with its answer alone."""

    def __init__(self, endpoint: Endpoint, pipe: Connection) -> None:
        self._endpoint = endpoint
        self._pipe = pipe
        self._expected: list[str] = []
        self._is_over = False
        self._lateness = Lateness()

    async def run(self) -> None:
        for number in range(len(QUESTIONS)):
            reply = await send(self._endpoint, self._request(number))
            if reply is None or reply.error is not None:
                self._pipe.send(reply.error if reply else "no answer")
                return
            self._expected.append(reply.texts[0])
        self._pipe.send(None)
        poller = HealthPoller(self._endpoint)
        poller.start()
        streams = [self._stream_on(number, poller) for number in range(len(QUESTIONS))]
        over = asyncio.create_task(asyncio.to_thread(self._pipe.recv))
        over.add_done_callback(self._end)
        ticks = asyncio.create_task(self._lateness.run())
        await asyncio.gather(over, *streams)
        ticks.cancel()
        poller.stop()
        self._pipe.send(poller.take())
        self._pipe.send(None)

    def _end(self, over: asyncio.Task[None]) -> None:
        self._is_over = True

    async def _stream_on(self, number: int, poller: HealthPoller) -> None:
        num_failed = 0
        while not self._is_over and num_failed < MAX_PROBLEMS:
            seen = poller.take()
            await self._stream(number, seen)
            num_failed += bool(seen.problems)
            self._pipe.send(seen)

    async def _stream(self, number: int, seen: Seen) -> None:
        reply = await send(self._endpoint, self._request(number))
        assert reply is not None
        seen.num_streams += 1
        question = QUESTIONS[number]
        if reply.error is not None:
            seen.blame(f"{question!r}: {reply.error}")
        elif reply.num_output_tokens != NUM_TOKENS:
            seen.blame(f"{question!r}: {reply.num_output_tokens} tokens")
        elif reply.texts[0] != self._expected[number]:
            seen.blame(f"{question!r}: {reply.texts[0]!r}, alone {self._expected[number]!r}")
        times = [reply.started_s, *reply.chunk_times]
        pairs = enumerate(itertools.pairwise(times))
        seen.add_gaps(
            [
                Gap(began_s, ended_s, self._lateness.between(began_s, ended_s), index)
                for index, (began_s, ended_s) in pairs
                if ended_s - began_s > MIN_GAP_S or index == 0
            ]
        )

    def _request(self, number: int) -> bytes:
        body = {
            "messages": [{"role": "user", "content": QUESTIONS[number]}],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,  # a token without text would be taken for a pause
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self._endpoint.encode("POST", "/v1/chat/completions", body)


class Lateness:
    """By how much this process is woken late."""

    def __init__(self) -> None:
        self._late: deque[tuple[float, float]] = deque(maxlen=10_000)  # when, and by how much

    async def run(self) -> None:
        while True:
            began_s = time.perf_counter()
            await asyncio.sleep(TICK_S)
            now_s = time.perf_counter()
            if now_s - began_s > 2 * TICK_S:
                self._late.append((now_s, now_s - began_s - TICK_S))

    def between(self, began_s: float, ended_s: float) -> float:
        """Seconds at most."""
        return max((late_s for at_s, late_s in self._late
                    if began_s <= at_s <= ended_s + late_s), default=0.0)  # fmt: skip


class HealthPoller(threading.Thread):
    """Asks /health from a thread of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(daemon=True)
        self._endpoint = endpoint
        self._seen = Seen()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(HEALTH_PAUSE_S):
            try:
                health_s = ask_health(self._endpoint)
                self._seen.health_s.append(health_s)
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                self._seen.blame(f"/health: {error}")

    def take(self) -> Seen:
        """What it has seen since the last call."""
        seen, self._seen = self._seen, Seen()
        return seen

    def stop(self) -> None:
        self._over.set()
        self.join()


def ask_health(endpoint: Endpoint) -> float:
    """Seconds until /health has said 200 on a fresh connection; RuntimeError for another status."""
    asked_s = time.perf_counter()
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=20)
    try:
        connection.request("GET", f"{endpoint.prefix}/health")
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}")
    return time.perf_counter() - asked_s
