"""A rank that follows: loads its part of the model and makes the calls that the leader makes.

`python -m pyserve.engine.tensor_parallel.follower FD`, where FD is its end of a socket, from which
the first word is a Start. It lives as long as the other end is open.
"""

from __future__ import annotations

import gc
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import msgspec
import numpy as np
import torch

from pyserve import __version__, allocator, collector, log
from pyserve.client import Adapter
from pyserve.config import EngineConfig, launched
from pyserve.engine import devices
from pyserve.engine.batch import AdapterLoad, Asked
from pyserve.engine.cuda_runner import RING_SIZE
from pyserve.engine.executor import StepExecutor
from pyserve.engine.load import load_weights, settle_sharing, settle_start
from pyserve.engine.planner import CardMemory
from pyserve.engine.state import StepLimits
from pyserve.engine.tensor_parallel import calls
from pyserve.engine.tensor_parallel.launched import LaunchedLine
from pyserve.engine.tensor_parallel.news import (
    BEAT_S,
    MAX_BYTES,
    Beat,
    Begin,
    Failed,
    Loaded,
    News,
    Planned,
    Shown,
    Start,
    decode_start,
    encode,
    path_of,
    receive,
)
from pyserve.engine.tensor_parallel.ring import Ring
from pyserve.errors import StartupError
from pyserve.model.adapter_weights import AdapterWeights, Pair
from pyserve.model.decoder import Decoder
from pyserve.ops import build
from pyserve.ops.card_group import join_group
from pyserve.ops.group import Group

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # the leader heeds them


class Line(Protocol):
    """How a follower hears from its leader, and is heard."""

    tp_rank: int

    def tell(self, news: News) -> None: ...

    def begin(self) -> Begin:
        """Waits for the leader's plan."""

    def join(self, device: torch.device) -> Group:
        """The Group of all ranks, once it has begun."""

    def call(self) -> bytes:
        """Waits for the next call."""


class LocalLine:
    """To a leader that has started this process: a socket, and from `begin` on a ring.

    Ends the process with the leader.
    """

    def __init__(self, sock: socket.socket, start: Start, meeting: int) -> None:
        self.tp_rank = start.tp_rank
        self._sock, self._start, self._meeting = sock, start, meeting
        self._begins: queue.SimpleQueue[tuple[Begin, list[int]]] = queue.SimpleQueue()
        self._ring: Ring | None = None
        threading.Thread(target=self._live, name="leader", daemon=True).start()

    def tell(self, news: News) -> None:
        self._sock.send(encode(news))

    def begin(self) -> Begin:
        begin, fds = self._begins.get()
        self._ring = Ring(fds, place_bytes=begin.place_bytes, num_places=begin.num_places)
        return begin

    def join(self, device: torch.device) -> Group:
        tp_size = self._start.config.tensor_parallel_size
        return join_group(path_of(self._meeting), self.tp_rank, tp_size, device)

    def call(self) -> bytes:
        assert self._ring is not None
        return self._ring.get(self.tp_rank - 1)

    def _live(self) -> None:
        """On a thread of its own: tells that this process lives, and ends it with the leader."""
        beat = encode(Beat())
        beat_s = 0.0
        while True:
            ready, _, _ = select.select([self._sock], [], [], BEAT_S)
            try:
                if ready:
                    news, fds = receive(self._sock)
                    if news is None:
                        break
                    assert isinstance(news, Begin), news
                    self._begins.put((news, fds))
                if time.monotonic() - beat_s >= BEAT_S:
                    beat_s = time.monotonic()
                    self._sock.send(beat)
            except OSError:
                break
        log.flush(0.1)
        os._exit(0)


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    word, fds, _, _ = socket.recv_fds(sock, MAX_BYTES, 1)
    if not word:  # the leader has ended, or its start was refused
        return
    start = decode_start(word)
    line = LocalLine(sock, start, fds[0])
    log.setup(start.log_level, prefix=f"rank {start.tp_rank}: ")
    allocator.fix_thresholds()
    os._exit(follow(start.config, line))  # what it holds may not be free to go


def follow_launched(config: EngineConfig) -> int:
    """As a follower that torchrun has started; returns the exit code. Raises StartupError."""
    here = launched()
    assert here is not None
    config = settle_sharing(config)
    device = devices.resolve_device(config.device, is_demo=False, tp_rank=here.tp_rank)
    return follow(config, LaunchedLine(device))


def follow(config: EngineConfig, line: Line) -> int:
    """Do what the leader does, until it ends; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    code = 1
    try:
        _follow(config, line)
        code = 0
    except StartupError as error:
        line.tell(Failed(str(error)))
    except BaseException as error:
        log.get_logger().exception("this rank has stopped")
        first_line, _, _ = str(error).partition("\n")
        if isinstance(line, LocalLine):  # the leader listens at all times
            line.tell(Failed(f"{type(error).__name__}: {first_line[:500]}"))
    log.flush()
    return code


def _follow(config: EngineConfig, line: Line) -> None:
    """Plan, load, and from then on do what is told."""
    own = settle_start(config, tp_rank=line.tp_rank)
    plan = own.plan
    shown = devices.describe(own.device)
    line.tell(Planned(plan.num_blocks, plan.max_model_len, shown, __version__))
    begin = line.begin()
    torch.set_num_threads(begin.num_threads)
    build.load_native(
        is_reference_allowed=config.allow_reference_ops,
        progress=log.get_logger().info,
        device="cuda" if own.device.type == "cuda" else "cpu",
    )
    group = line.join(own.device)

    def load() -> Decoder:
        return load_weights(config, own, begin.max_model_len, group=group)

    began_s = time.monotonic()
    limits = StepLimits(
        num_slots=begin.num_slots,
        max_num_batched_tokens=begin.max_num_batched_tokens,
        max_model_len=begin.max_model_len,
        block_size=begin.block_size,
        logits_tile_rows=begin.logits_tile_rows,
    )
    executor = StepExecutor(load(), limits)
    bring = executor.bring if own.device.type == "cpu" else Pinned(executor).bring
    line.tell(Loaded(time.monotonic() - began_s))
    gc.collect()
    gc.freeze()
    stream: AbstractContextManager[object] = nullcontext()
    if own.device.type == "cuda":
        torch.cuda.synchronize(own.device)
        own_stream = torch.cuda.Stream(own.device)  # type: ignore[no-untyped-call]
        stream = torch.cuda.stream(own_stream)
    while True:
        call = msgspec.msgpack.decode(line.call(), type=calls.AnyCall)
        if isinstance(call, calls.Close):
            return
        if isinstance(call, calls.AllocateKV):  # as CudaRunner does
            executor.allocate_kv(call.num_blocks)
        elif isinstance(call, calls.TakeModel):
            began_s = time.monotonic()
            executor.take_model(load)
            line.tell(Loaded(time.monotonic() - began_s))
        elif isinstance(call, calls.Measure):
            assert isinstance(own.memory, CardMemory)
            now = devices.card_memory(own.device)
            line.tell(
                Shown(now.total_bytes, own.memory.used_bytes, now.used_bytes, plan.block_bytes)
            )
        else:
            with stream:
                if isinstance(call, calls.Bring):
                    bring(torch.frombuffer(bytearray(call.words), dtype=torch.int32))
                else:
                    _make(call, executor)
            continue
        if own.device.type == "cuda":
            torch.cuda.synchronize(own.device)


class Pinned:
    """Steps in page-locked memory, from which a card copies them when it comes to it: a copy from
    other memory would hold the follower up until all in front of it has ended.
    """

    def __init__(self, executor: StepExecutor) -> None:
        size = len(executor.step_input)
        self._executor = executor
        self._places = deque(
            (
                torch.empty(size, dtype=torch.int32, pin_memory=True),
                torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(RING_SIZE)
        )

    def bring(self, words: torch.Tensor) -> None:
        """As StepExecutor.bring, on the current stream."""
        place, is_copied = self._places[0]
        self._places.rotate(-1)
        is_copied.synchronize()
        place[: len(words)] = words
        self._executor.bring(place[: len(words)])
        is_copied.record()


def _make(call: calls.AnyCall, executor: StepExecutor) -> None:
    """A call that needs the executor alone."""
    match call:
        case calls.Forward(shape, is_warmup):
            executor.forward(shape, is_warmup=is_warmup)
        case calls.Sample(shape, prompt_rows):
            asked = Asked([], prompt_rows, prompt_rows)
            if prompt_rows:
                packed = np.zeros(len(executor.asked), np.int32)
                executor.pack_asked(asked, packed)
                executor.asked.copy_(torch.from_numpy(packed))
            executor.sample(shape, (), asked)
        case calls.Record(shape):
            with collector.paused():  # as CudaRunner does
                executor.record(shape)
        case calls.Reset():
            executor.reset()
        case calls.FreeKV():
            executor.free_kv()
            allocator.trim()
        case calls.DropModel():
            executor.drop_model()
            allocator.trim()
        case calls.PutAdapter():
            weights = AdapterWeights(_read_pairs(call), "")
            executor.put_adapter(AdapterLoad(call.slot, Adapter("", 0, weights)))


def _read_pairs(call: calls.PutAdapter) -> dict[str, Pair]:
    dtype = getattr(torch, call.dtype)
    numbers = torch.from_numpy(np.fromfile(call.path, np.uint8)).view(dtype)
    sizes = [
        num for it in call.pairs for num in (it.size * it.in_features, it.out_features * it.size)
    ]
    flat = iter(torch.split(numbers, sizes))
    return {
        it.module: Pair(next(flat).view(it.size, -1), next(flat).view(-1, it.size), it.scale)
        for it in call.pairs
    }


if __name__ == "__main__":
    main()
