"""A scripted engine, a small trained tokenizer, and the real HTTP stack on a loopback port."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from pyserve.api.app import build_app
from pyserve.api.http.connections import Connections
from pyserve.api.http.http_protocol import listening
from pyserve.api.http.inner import InnerClient
from pyserve.api.state import Loaded, ServerState
from pyserve.client import (
    Adapter,
    AdapterStore,
    Constraint,
    EngineClient,
    EngineInfo,
    EngineStats,
    PoolingInfo,
    SequenceRequest,
    SequenceStream,
    TokenLogprobs,
)
from pyserve.config import ServerConfig
from pyserve.errors import EngineError, PyserveError, QueueFullError, UnavailableError
from pyserve.limits import TOP_LOGPROBS
from pyserve.metrics import Metrics
from pyserve.params import SamplingParams
from pyserve.text.chat_template import ChatTemplate
from pyserve.text.reasoning import ReasoningParser
from pyserve.text.score_template import ScoreTemplate
from pyserve.text.tokenizer import GenerationDefaults, Tokenizer
from pyserve.text.tool_parsers.registry import ToolFormat

if TYPE_CHECKING:  # it takes a second, which the processes of served.py need not spend
    from openai import OpenAI

MODEL = "org/tiny"
CONTEXT = 512
PADDED_VOCAB = 448  # of the model: more than the tokenizer has
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "La capital de Francia es París. Hello world, how are you?\n",
    "😀 emoji and 漢字 take several tokens.",
]


def make_tokenizer_folder(folder: Path) -> Path:
    """A byte-level BPE tokenizer with a ChatML template, as a model's folder holds it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[
            AddedToken(token, special=True)
            for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Script:
    """What a sequence does: these tokens, `burst` at a time every `delay_s`, then its end.

    starts     a queued sequence never begins where False.
    error      it fails with this instead of going on to its limit.
    is_whole   its end is the end of the answer, though it is no stop token.
    may_end    the last of max_tokens does not come until this is so.
    """

    token_ids: list[int]
    delay_s: float = 0.0
    burst: int = 1
    starts: bool = True
    error: PyserveError | None = None
    is_whole: bool = False
    may_end: Callable[[], bool] = lambda: True


@dataclass
class Submitted:
    prompt: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str
    user: str
    constraint: Constraint | None
    stream: SequenceStream
    adapter: Adapter | None = None
    is_aborted: bool = False
    num_tokens: int = 0
    task: asyncio.Task[None] | None = None


@dataclass
class FakeEngine:
    """EngineClient that plays scripts; stop ids and limits end a sequence as in the real one.

    Where a constraint forbids the next token of a script, one that it allows comes before it.

    pool  what the ids of a prompt become, where info.pooling says that it pools.
    """

    script: Callable[[int], Script]
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(
            max_model_len=CONTEXT, vocab_size=PADDED_VOCAB, max_num_seqs=8, block_size=16,
            num_blocks=64, dtype="float32", device="cpu",
        )
    )  # fmt: skip
    submitted: list[Submitted] = field(default_factory=list)
    error: str | None = None
    is_started: bool = False
    is_stopped: bool = False
    num_cached_tokens: int = 0
    num_resets: int = 0
    sleep_level: int = 0
    room: int | None = None  # sequences it takes; None: any number
    pool: Callable[[list[int]], NDArray[np.float32]] = lambda ids: np.zeros(1, np.float32)
    adapters: AdapterStore | None = None
    gave_up: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        self.is_started = True

    async def stop(self) -> None:
        self.is_stopped = True
        for item in self.running():
            item.stream.fail(UnavailableError("the server is shutting down"))

    async def wait_stopped(self) -> str:
        await self.gave_up.wait()
        assert self.error is not None
        return self.error

    def give_up(self, reason: str) -> None:
        """As the real one after a bug: fail everything, take nothing more."""
        self.error = reason
        self.gave_up.set()
        for item in self.running():
            item.stream.fail(EngineError(reason))

    def check_room(self, num_sequences: int, *, num_tokens: int = 0, user: str = "") -> None:
        if self.room is not None and len(self.running()) + num_sequences > self.room:
            raise QueueFullError("the queue is full", 7)

    def submit(self, request: SequenceRequest) -> SequenceStream:
        if self.is_stopped:
            raise UnavailableError("the server is shutting down")
        if self.error is not None:
            raise UnavailableError(self.error)
        self.check_room(1)
        number = len(self.submitted)
        stream = SequenceStream(number, len(request.prompt_token_ids))
        item = Submitted(
            list(request.prompt_token_ids), request.params, request.priority, request.cache_salt,
            request.user, request.constraint, stream, request.adapter,
        )  # fmt: skip
        self.submitted.append(item)
        item.task = asyncio.get_running_loop().create_task(self._play(item, self.script(number)))
        return stream

    def abort(self, stream: SequenceStream) -> None:
        if not stream.is_finished:
            self.submitted[stream.seq_id].is_aborted = True
            stream.finish("abort")

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    async def sleep(self, level: int) -> None:
        self.sleep_level = level

    async def wake_up(self) -> None:
        self.sleep_level = 0

    def stats(self) -> EngineStats:
        num_running = len(self.running())
        return EngineStats(
            num_running=num_running, num_waiting=0, num_blocks_used=16 * num_running,
            num_preemptions=1, num_steps=2, prompt_tokens=100, cached_tokens=25, output_tokens=50,
            step_age_s=0.0, error=self.error, sleep_level=self.sleep_level,
        )  # fmt: skip

    def running(self) -> list[Submitted]:
        return [item for item in self.submitted if not item.stream.is_finished]

    async def _play(self, item: Submitted, script: Script) -> None:
        stream, params = item.stream, item.params
        if not script.starts:
            return
        stream.admit(self.num_cached_tokens)
        if self.info.pooling is not None:
            await asyncio.sleep(script.delay_s)
            stream.pooled = self.pool(item.prompt)
            stream.first_token_s = time.monotonic()
            if not stream.is_finished:
                stream.finish("stop")
            return
        if params.num_prompt_logprobs is not None:
            rest = item.prompt[1:]
            told = [logprobs_of(i, place) for place, i in enumerate(rest, 1)]
            num_top = params.num_prompt_logprobs
            stream.prompt_logprobs += [entry.best(num_top) for entry in told]
        position = item.num_tokens = 0
        while True:
            await asyncio.sleep(script.delay_s)
            for _ in range(script.burst):
                if stream.is_finished:
                    return
                while item.num_tokens == params.max_tokens - 1 and not script.may_end():
                    await asyncio.sleep(0.005)
                    if stream.is_finished:
                        return
                if position == len(script.token_ids) and script.error is not None:
                    stream.fail(script.error)
                    return
                wanted = script.token_ids[position % len(script.token_ids)]
                token_id = self._constrained(item.constraint, wanted)
                position += token_id == wanted
                item.num_tokens += 1
                asks = params.num_logprobs is not None
                entry = logprobs_of(token_id, item.num_tokens).best(params.num_logprobs)
                stream.put([token_id], [entry] if asks else None)
                if item.num_tokens == 1:
                    stream.first_token_s = time.monotonic()
                is_stop = token_id in params.stop_token_ids and item.num_tokens > params.min_tokens
                if is_stop and not (item.constraint and item.constraint.is_end_void):
                    stream.finish("stop", token_id)
                elif script.is_whole and position == len(script.token_ids):
                    stream.finish("stop")
                elif item.num_tokens == params.max_tokens:
                    stream.finish("length")
                elif item.constraint is not None and item.constraint.is_finished:
                    stream.finish("stop")

    def _constrained(self, constraint: Constraint | None, wanted: int) -> int:
        """The token that the script wants or, where that is not allowed, the first one that is."""
        token_id = wanted
        if constraint is not None and not constraint.is_free:
            words = np.zeros(-(-self.info.vocab_size // 32), np.int32)
            constraint.fill_bitmask(words)
            is_allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
            token_id = wanted if is_allowed[wanted] else int(is_allowed.argmax())
            assert is_allowed[token_id], "nothing is allowed"
        if constraint is not None:
            constraint.accept([token_id])
            assert constraint.error is None, constraint.error
        return token_id


def logprobs_of(token_id: int, place: int) -> TokenLogprobs:
    """Made up: the token has rank 2, the ids 0, its own, 1, 2, ... are the most likely ones."""
    others = [i for i in range(TOP_LOGPROBS + 1) if i != token_id]
    ids = [others[0], token_id, *others[1 : TOP_LOGPROBS - 1]]
    logprobs = [-float(place) - i / 8 for i in range(TOP_LOGPROBS)]
    logprobs[-1] = -math.inf
    return TokenLogprobs(logprobs[1], 2, ids, logprobs)


def exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: object = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """Status, headers and body; `body` is bytes or becomes JSON."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    connection.request(method, path, data, sent)
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


class Server:
    """An app on a loopback port, on the event loop of its own thread."""

    def __init__(
        self, state: ServerState, engine: FakeEngine, sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self.state = state
        self.loop = loop
        self.engine = engine
        self.listener = sock
        self.port: int = sock.getsockname()[1]
        self.connections: Connections

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.state.loaded is not None
        return self.state.loaded.tokenizer

    def play(self, text: str, *, eos: bool = True, **options: Any) -> list[int]:
        """Let every sequence say `text`, then end with EOS."""
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        if eos:
            assert self.tokenizer.eos_token_id is not None
            token_ids.append(self.tokenizer.eos_token_id)
        self.engine.submitted.clear()
        self.engine.script = lambda number: Script(token_ids, **options)
        return token_ids

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; `body` is bytes or becomes JSON."""
        with closing(self.connection()) as connection:
            return exchange(connection, method, path, body, headers)

    def connection(self) -> http.client.HTTPConnection:
        """For many requests, by `exchange`: a new one each takes longer than most answers."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def post(self, path: str, body: object) -> Any:
        """The decoded body of a 200."""
        status, _, reply = self.request("POST", path, body)
        assert status == 200, reply
        return json.loads(reply)

    def error(self, path: str, body: object, status: int = 400) -> dict[str, Any]:
        """The error object of a refusal."""
        got, _, reply = self.request("POST", path, body)
        assert got == status, reply
        error: dict[str, Any] = json.loads(reply)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        return error

    def frames(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The decoded SSE frames of a streamed answer, without [DONE]."""
        status, headers, reply = self.request("POST", path, {**body, "stream": True})
        assert status == 200, reply
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        lines = reply.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def connect(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A bare socket with the request sent, for clients that hang up or read slowly."""
        data = json.dumps(body).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        return sock

    def sdk(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="k", max_retries=0, timeout=20
        )


@contextmanager
def asking_health(server: Server) -> Iterator[list[float]]:
    """How long each /health takes meanwhile."""
    latencies_s: list[float] = []
    is_done = threading.Event()

    def poll() -> None:
        while not is_done.wait(0.01):
            asked_s = time.monotonic()
            server.request("GET", "/health")
            latencies_s.append(time.monotonic() - asked_s)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        yield latencies_s
    finally:
        is_done.set()
        poller.join(30)


def least(measure: Callable[[], float], bar: float, num_tries: int = 4) -> float:
    """The least of a few measurements, and none more after one below `bar`.

    What is above it every time is ours; what is above it now and then is the machine's.
    """
    seen = [measure()]
    while min(seen) >= bar and len(seen) < num_tries:
        seen.append(measure())
    return min(seen)


@contextmanager
def run_server(
    folder: Path,
    *,
    other: EngineClient | None = None,
    pooling: PoolingInfo | None = None,
    tls: ssl.SSLContext | None = None,
    **config: Any,
) -> Iterator[Server]:
    """A ready server around a FakeEngine, or an `other` one, with the tokenizer of `folder`.

    pooling  of a fake that pools; it, or an other one, is shown pairs as a Qwen3 reranker is.
    """
    tokenizer = Tokenizer.from_folder(folder)
    fake = FakeEngine(lambda number: Script([1]))
    fake.info = replace(fake.info, pooling=pooling)
    engine = other or fake
    settings = ServerConfig(served_model_names=(MODEL, "alias"), **config)
    template = ChatTemplate.load(tokenizer)
    loaded = Loaded(
        tokenizer=tokenizer,
        chat_template=template,
        defaults=GenerationDefaults(eos_token_ids=(0,)),
        engine=engine,
        reasoning=ReasoningParser.named(settings.reasoning_parser, tokenizer),
        tools=ToolFormat.named(settings.tool_call_parser, tokenizer),
        score_template=ScoreTemplate.find(template, tokenizer, model_type="qwen3"),
    )
    sock = socket.create_server(("127.0.0.1", 0))
    state = ServerState(settings, Metrics(MODEL), loaded=loaded, status="ready")
    state.open_batches()
    state.metrics.watch(engine.stats, engine.info)
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    server = Server(state, fake, sock, loop)

    async def serve() -> None:
        engine.start()
        async with listening(build_app(state), sock, tls=tls) as (
            connections,
            make_protocol,
        ):
            server.connections = connections
            if state.batches is not None:
                state.batches.start(engine, partial(InnerClient, make_protocol))
            started.set()
            await stop.wait()
            if state.batches is not None:
                await state.batches.stop()
        await engine.stop()
        tasks = [item.task for item in fake.submitted if item.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        state.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(30)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
        sock.close()
