"""run_load: sends a load of requests to a server from one or more client processes.

Requests are numbered. Number i is the same request in every process (it is seeded by (seed, i)), so
the processes only need to share a counter. In a closed loop each slot sends the next number when
its last request has ended. In an open loop number i is sent at its own random arrival time, however
late the server is, and is timed from that arrival.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import time
from typing import Any

import msgspec
import numpy as np

from pyserve.http_client import Connection, Endpoint, Reply

# Each of these words, after a space, is one token in common vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line"
).split()


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one server.

    models                 one is drawn per request; empty: requests name no model.
    is_chat, is_text       requests are chats, or completions of text; neither: completions of
                           token ids.
    input_len, output_len  inclusive ranges of the number of tokens (words in a text).
    shared_prefix_len      number of tokens (words) at the start of every prompt that all share.
    vocab_size             random token ids are below it.
    prompts                texts to send in turn; empty: prompts are random.
    request_rate           arrivals per second; None: a closed loop of `concurrency` slots.
    burstiness             shape of the gamma distribution of the gaps between arrivals: 1 is a
                           Poisson process, less makes bursts, more an even stream.
    has_continuous_usage   the server is asked to count the tokens in every frame, which costs it a
                           little more for each.
    first_number           number of the first request, so that warm-up requests can be different.
    timeout_s              after so many seconds a request fails.
    """

    url: str
    models: tuple[str, ...]
    api_key: str | None = None
    is_chat: bool = False
    is_text: bool = False
    input_len: tuple[int, int] = (128, 128)
    output_len: tuple[int, int] = (128, 128)
    shared_prefix_len: int = 0
    vocab_size: int = 32000
    num_requests: int = 3
    concurrency: int = 1
    prompts: tuple[str, ...] = ()
    request_rate: float | None = None
    burstiness: float = 1.0
    seed: int = 0
    first_number: int = 0
    ignore_eos: bool = True
    has_continuous_usage: bool = False
    temperature: float = 0.0
    extra_body: dict[str, Any] = {}
    timeout_s: float = 600.0


class RequestRecord(msgspec.Struct, frozen=True):
    """The result of one request. Times are in perf_counter seconds, one clock for all processes.

    started_s         when it was sent; in an open loop, when it was due.
    first_s, last_s   arrival of the first and the last frame with tokens; None: there was none.
    gaps              seconds between frames with tokens.
    gap_tokens        number of tokens in the frame that ended each gap, 0 in one that only ended
                      the stream; empty where the server did not say, or of several choices.
    num_asked_tokens  max_tokens of the request.
    has_usage         tokens were counted by the server; else by frames.
    late_s            seconds between when it was due and when it was sent.
    error             None where it succeeded.
    """

    number: int
    started_s: float
    ended_s: float
    first_s: float | None
    last_s: float | None
    gaps: list[float]
    gap_tokens: list[int]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_asked_tokens: int
    has_usage: bool
    late_s: float
    error: str | None


def time_per_output_token(record: RequestRecord) -> float | None:
    """(last_s - first_s) / (output tokens - 1), in s; None where one frame held all tokens."""
    if record.first_s is None or record.last_s is None or not record.gaps:
        return None
    return (record.last_s - record.first_s) / (record.num_output_tokens - 1)


class WorkerReport(msgspec.Struct, frozen=True):
    """The requests of one client process, and how busy the process was meanwhile.

    cpu_s       CPU time that it used.
    wall_s      time from its start to its last answer.
    num_resent  requests that were sent again because a kept connection was closed by the server.
    """

    records: list[RequestRecord]
    cpu_s: float
    wall_s: float
    num_resent: int


def build_request(spec: LoadSpec, number: int) -> tuple[str, dict[str, Any]]:
    """Path and body of request `number`."""
    rng = np.random.default_rng([spec.seed, number])
    input_len = int(rng.integers(spec.input_len[0], spec.input_len[1] + 1))
    output_len = int(rng.integers(spec.output_len[0], spec.output_len[1] + 1))
    prefix_len = min(spec.shared_prefix_len, input_len)
    prefix_rng = np.random.default_rng([spec.seed])
    is_ids = not (spec.is_chat or spec.is_text or spec.prompts)
    size = spec.vocab_size if is_ids else len(WORDS)
    prefix = prefix_rng.integers(0, size, spec.shared_prefix_len)[:prefix_len].tolist()
    ids = prefix + rng.integers(0, size, input_len - prefix_len).tolist()
    options = {"include_usage": True}
    if spec.has_continuous_usage:
        options["continuous_usage_stats"] = True
    body: dict[str, Any] = {
        "max_tokens": output_len,
        "temperature": spec.temperature,
        "stream": True,
        "stream_options": options,
    }
    if spec.models:
        body["model"] = spec.models[int(rng.integers(0, len(spec.models)))]
    if spec.ignore_eos:
        body["ignore_eos"] = True
    if spec.prompts:
        text = spec.prompts[number % len(spec.prompts)]
    else:
        text = "" if is_ids else " ".join(WORDS[i] for i in ids)
    if spec.is_chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = ids if is_ids else text
    path = "/v1/chat/completions" if spec.is_chat else "/v1/completions"
    return path, {**body, **spec.extra_body}


def arrival_times(spec: LoadSpec) -> np.ndarray:
    """Seconds after the start at which each request is sent (open loop)."""
    assert spec.request_rate is not None
    rng = np.random.default_rng([spec.seed, 2**40])
    if spec.burstiness == 1.0:
        gaps = rng.exponential(1.0 / spec.request_rate, spec.num_requests)
    else:
        scale = 1.0 / (spec.request_rate * spec.burstiness)
        gaps = rng.gamma(spec.burstiness, scale, spec.num_requests)
    gaps[0] = 0.0
    return np.cumsum(gaps)


def run_load(spec: LoadSpec, num_processes: int) -> list[WorkerReport]:
    """Run the load from `num_processes` fresh processes that begin together."""
    context = multiprocessing.get_context("spawn")
    if spec.request_rate is None:
        num_processes = min(num_processes, spec.concurrency)
    counter = context.Value("q", 0)
    workers = []
    for worker_number in range(num_processes):
        ours, theirs = context.Pipe()
        args = (spec, worker_number, num_processes, counter, theirs)
        process = context.Process(target=_worker, args=args, daemon=True)
        process.start()
        theirs.close()
        workers.append((process, ours))
    try:
        for _, pipe in workers:
            pipe.recv()  # it has finished its imports and is ready
        start_s = time.perf_counter() + 0.1
        for _, pipe in workers:
            pipe.send(start_s)
        decoder = msgspec.msgpack.Decoder(WorkerReport)
        return [decoder.decode(pipe.recv_bytes()) for _, pipe in workers]
    except EOFError:
        raise RuntimeError("a client process died; its traceback is above") from None
    finally:
        for process, _ in workers:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _worker(
    spec: LoadSpec, worker_number: int, num_processes: int, counter: Any, pipe: Any
) -> None:
    pipe.send(worker_number)
    start_s = pipe.recv()
    gc.freeze()
    gc.disable()  # a pause of the client would be taken for one of the server
    report = asyncio.run(_Client(spec).run(worker_number, num_processes, counter, start_s))
    pipe.send_bytes(msgspec.msgpack.encode(report))


class _Client:
    """One client process: its idle connections and its records."""

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self.endpoint = Endpoint.parse(spec.url, spec.api_key)
        self.idle: list[Connection] = []
        self.records: list[RequestRecord] = []
        self.num_resent = 0

    async def run(
        self, worker_number: int, num_processes: int, counter: Any, start_s: float
    ) -> WorkerReport:
        spec = self.spec
        await asyncio.sleep(max(0.0, start_s - time.perf_counter()))
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        if spec.request_rate is None:
            num_slots = spec.concurrency // num_processes
            num_slots += worker_number < spec.concurrency % num_processes
            await asyncio.gather(*(self._slot(counter) for _ in range(num_slots)))
        else:
            due_s = start_s + arrival_times(spec)
            mine = range(worker_number, spec.num_requests, num_processes)
            await asyncio.gather(*(self._arrival(number, float(due_s[number])) for number in mine))
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        for connection in self.idle:
            connection.close()
        return WorkerReport(self.records, cpu_s, wall_s, self.num_resent)

    async def _slot(self, counter: Any) -> None:
        while True:
            with counter.get_lock():
                number = counter.value
                counter.value += 1
            if number >= self.spec.num_requests:
                return
            await self._send(number, None)

    async def _arrival(self, number: int, due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        await self._send(number, due_s)

    async def _send(self, number: int, due_s: float | None) -> None:
        path, body = build_request(self.spec, self.spec.first_number + number)
        request = self.endpoint.encode("POST", path, body)
        now = time.perf_counter()
        started_s = now if due_s is None else due_s
        reply = await self._exchange(request, started_s)
        self.records.append(_record(number, reply, body["max_tokens"], now - started_s))

    async def _exchange(self, request: bytes, started_s: float) -> Reply:
        """Send a request on an idle connection, or on a new one if the server has closed that."""
        timeout_s = self.spec.timeout_s
        while self.idle:
            connection = self.idle.pop()
            if not connection.is_usable:
                continue
            reply = await connection.exchange(request, started_s=started_s, timeout_s=timeout_s)
            if not reply.is_unanswered:
                return self._keep(connection, reply)
            self.num_resent += 1
            break
        try:
            connection = await asyncio.wait_for(Connection.open(self.endpoint), timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            message = f"cannot connect: {str(error) or 'timed out'}"
            return Reply(started_s, ended_s=time.perf_counter(), error=message)
        reply = await connection.exchange(request, started_s=started_s, timeout_s=timeout_s)
        return self._keep(connection, reply)

    def _keep(self, connection: Connection, reply: Reply) -> Reply:
        if connection.is_usable:
            self.idle.append(connection)
        return reply


def _record(number: int, reply: Reply, num_asked: int, late_s: float) -> RequestRecord:
    """The record of a reply. An answer without any token is an error."""
    num_output_tokens = reply.num_output_tokens
    error = reply.error
    if error is None and num_output_tokens == 0:
        error = "an answer without a token"
    # There may be one frame more than tokens: a last one that only ends the stream.
    times = reply.chunk_times[:num_output_tokens]
    return RequestRecord(
        number=number,
        started_s=reply.started_s,
        ended_s=reply.ended_s,
        first_s=times[0] if times else None,
        last_s=times[-1] if times else None,
        gaps=np.diff(times).tolist(),
        gap_tokens=_gap_tokens(reply)[: max(0, len(times) - 1)],
        num_prompt_tokens=reply.usage.prompt_tokens if reply.usage else 0,
        num_cached_tokens=reply.num_cached_tokens,
        num_output_tokens=num_output_tokens,
        num_asked_tokens=num_asked,
        has_usage=reply.usage is not None,
        late_s=late_s,
        error=error,
    )


def _gap_tokens(reply: Reply) -> list[int]:
    """Tokens of each frame but the first; empty where they are not known of every frame."""
    # Each choice is counted alone, so counts of several choices cannot be subtracted.
    if len(reply.chunk_counts) != len(reply.chunk_times) or len(reply.finish_reasons) > 1:
        return []
    return np.diff(reply.chunk_counts).tolist()
