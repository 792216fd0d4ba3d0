"""A follower rank: loads its part of the model and repeats the executor calls of the leader.

Run as `python -m pyserve.engine.tensor_parallel.follower FD`, where FD is its end of a socket whose
first message is a Start. The process ends when the other end of the socket is closed.
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

from pyserve import allocator, collector, log
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
from pyserve.model.fingerprint import fingerprint
from pyserve.ops import build
from pyserve.ops.card_group import join_group
from pyserve.ops.group import Group, is_by_others

# Ignored here: the leader handles them and then ends its followers.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Line(Protocol):
    """A follower's connection to its leader."""

    tp_rank: int

    def tell(self, news: News) -> None:
        """Send a message to the leader."""

    def begin(self) -> Begin:
        """Wait for the leader's plan."""

    def join(self, device: torch.device) -> Group:
        """Join the process group of all ranks; called after `begin`."""

    def call(self) -> bytes:
        """Wait for the leader's next call; returns an encoded calls.AnyCall."""


class LocalLine:
    """The Line to a leader that has started this process: a socket, and from `begin` on a ring.

    If the leader ends, this ends the process.
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
        """Send heartbeats, and end the process if the leader does; runs on a thread of its own."""
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
    """Run this process as a follower of the leader that has started it."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    word, fds, _, _ = socket.recv_fds(sock, MAX_BYTES, 1)
    if not word:  # the leader has ended, or it has refused to start
        return
    start = decode_start(word)
    line = LocalLine(sock, start, fds[0])
    log.setup(start.log_level, prefix=f"rank {start.tp_rank}: ")
    allocator.fix_thresholds()
    os._exit(follow(start.config, line))  # no destructors: after a failure they might not return


def follow_launched(config: EngineConfig) -> int:
    """Run this process as a follower that torchrun has started; returns the exit code.

    Raises StartupError.
    """
    here = launched()
    assert here is not None
    config = settle_sharing(config)
    device = devices.resolve_device(config.device, is_demo=False, tp_rank=here.tp_rank)
    return follow(config, LaunchedLine(device))


def follow(config: EngineConfig, line: Line) -> int:
    """Load this rank's part and make the leader's calls until it ends; returns the exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    code = 1
    try:
        _follow(config, line)
        code = 0
    except StartupError as error:
        line.tell(Failed(str(error)))
    except BaseException as error:
        first_line, _, _ = str(error).partition("\n")
        if is_by_others(error):
            log.get_logger().error("this rank cannot go on alone: %s", first_line[:200])
        else:
            log.get_logger().exception("this rank has stopped")
        if isinstance(line, LocalLine):  # under torchrun the leader may not be listening
            line.tell(Failed(f"{type(error).__name__}: {first_line[:500]}"))
    log.flush()
    return code


def _follow(config: EngineConfig, line: Line) -> None:
    """Plan and load, then make the leader's calls until Close."""
    own = settle_start(config, tp_rank=line.tp_rank)
    plan = own.plan
    shown = devices.describe(own.device)
    model = ""
    if not isinstance(line, LocalLine):  # a rank on another machine reads files of its own
        model = fingerprint(config.model_path, has_weights=config.load_format != "dummy")
    line.tell(Planned(plan.num_blocks, plan.max_model_len, shown, model))
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
        if isinstance(call, calls.AllocateKV):  # not on `stream`: see CudaRunner._allocate_kv
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
    """A ring of page-locked host buffers, from which packed steps are copied to a card.

    The copies are asynchronous. A copy from ordinary memory would block the follower until all work
    that was queued before it has ended.
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
        """As StepExecutor.bring, on the current stream; waits for a free buffer if needed."""
        place, is_copied = self._places[0]
        self._places.rotate(-1)
        is_copied.synchronize()
        place[: len(words)] = words
        self._executor.bring(place[: len(words)])
        is_copied.record()


def _make(call: calls.AnyCall, executor: StepExecutor) -> None:
    """Make a call that needs nothing but the executor."""
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
            with collector.paused():  # see CudaRunner._record
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
