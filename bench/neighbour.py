"""An innocent neighbour of hostile clients: streams that stay exact, a /health that answers."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import threading
import time
from dataclasses import dataclass, field

from bench.soak import send
from bench.wire import Endpoint

QUESTIONS = ("What is the capital of France?", "Escribe un poema", "Explain gravity.")
NUM_TOKENS = 64
HEALTH_PAUSE_S = 0.1
MAX_PROBLEMS = 20


@dataclass(slots=True)
class Seen:
    """What the neighbour has seen so far."""

    num_streams: int = 0
    max_gap_s: float = 0.0
    health_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def blame(self, problem: str) -> None:
        if not self.has_enough:
            self.problems.append(problem)

    @property
    def has_enough(self) -> bool:
        return len(self.problems) >= MAX_PROBLEMS


class Neighbour:
    """Greedy streams of known prompts, one after the other, each compared with its answer alone."""

    def __init__(self, endpoint: Endpoint, seen: Seen) -> None:
        self._endpoint = endpoint
        self._seen = seen
        self._expected: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    async def start(self) -> None:
        """RuntimeError where one stream alone fails."""
        for number in range(len(QUESTIONS)):
            reply = await send(self._endpoint, self._request(number))
            if reply is None or reply.error is not None:
                raise RuntimeError(f"one stream alone fails: {reply.error if reply else ''}")
            self._expected.append(reply.texts[0])
        self._tasks = [
            asyncio.create_task(self._stream_on(number)) for number in range(len(QUESTIONS))
        ]

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _stream_on(self, number: int) -> None:
        seen = self._seen
        while not self._is_over and not seen.has_enough:
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
            gaps = [after - before for before, after in itertools.pairwise(times)]
            seen.max_gap_s = max(seen.max_gap_s, *gaps, 0.0)

    def _request(self, number: int) -> bytes:
        body = {
            "messages": [{"role": "user", "content": QUESTIONS[number]}],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return self._endpoint.encode("POST", "/v1/chat/completions", body)


class HealthPoller(threading.Thread):
    """Asks /health from a thread of its own: the loop here is as busy as the server."""

    def __init__(self, endpoint: Endpoint, seen: Seen) -> None:
        super().__init__(daemon=True)
        self._endpoint = endpoint
        self._seen = seen
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(HEALTH_PAUSE_S):
            try:
                self._seen.health_s.append(ask_health(self._endpoint))
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                self._seen.blame(f"/health: {error}")

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
