"""A rank that follows: loads its part of the model and makes the calls that the leader makes.

`python -m pyserve.engine.tensor_parallel.follower FD`, where FD is its end of a socket. It lives as
long as the other end is open.
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
from contextlib import AbstractContextManager, nullcontext

import msgspec
import numpy as np
import torch

from pyserve import allocator, collector, log
from pyserve.client import Adapter
from pyserve.engine import devices
from pyserve.engine.batch import AdapterLoad, Asked
from pyserve.engine.executor import StepExecutor
from pyserve.engine.load import load_weights, settle_start
from pyserve.engine.planner import CardMemory
from pyserve.engine.state import StepLimits
from pyserve.engine.tensor_parallel import calls
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
    receive,
)
from pyserve.engine.tensor_parallel.ring import Ring
from pyserve.errors import StartupError
from pyserve.model.adapter_weights import AdapterWeights, Pair
from pyserve.model.decoder import Decoder
from pyserve.ops import build
from pyserve.ops.group import ProcessGroup

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # the leader heeds them


def main() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    start = decode_start(sock.recv(MAX_BYTES))
    log.setup(start.log_level, prefix=f"rank {start.tp_rank}: ")
    allocator.fix_thresholds()
    begins: queue.SimpleQueue[tuple[Begin, list[int]]] = queue.SimpleQueue()
    threading.Thread(target=_live, args=(sock, begins), name="leader", daemon=True).start()
    try:
        _follow(start, sock, begins)
    except StartupError as error:
        sock.send(encode(Failed(str(error))))
    except BaseException as error:
        first_line, _, _ = str(error).partition("\n")
        sock.send(encode(Failed(f"{type(error).__name__}: {first_line[:500]}")))
        log.get_logger().exception("this rank has stopped")
    log.flush()
    os._exit(1)  # what it holds may not be free to go


def _live(sock: socket.socket, begins: queue.SimpleQueue[tuple[Begin, list[int]]]) -> None:
    """On a thread of its own: tells that this process lives, and ends it with the leader."""
    beat = encode(Beat())
    beat_s = 0.0
    while True:
        ready, _, _ = select.select([sock], [], [], BEAT_S)
        try:
            if ready:
                news, fds = receive(sock)
                if news is None:
                    break
                assert isinstance(news, Begin), news
                begins.put((news, fds))
            if time.monotonic() - beat_s >= BEAT_S:
                beat_s = time.monotonic()
                sock.send(beat)
        except OSError:
            break
    log.flush(0.1)
    os._exit(0)


def _follow(
    start: Start, sock: socket.socket, begins: queue.SimpleQueue[tuple[Begin, list[int]]]
) -> None:
    """Plan, load, and from then on do what is told; returns never."""
    config, tp_rank = start.config, start.tp_rank

    def tell(news: News) -> None:
        sock.send(encode(news))

    own = settle_start(config, tp_rank=tp_rank)
    plan = own.plan
    tell(Planned(plan.num_blocks, plan.max_model_len, devices.describe(own.device)))
    begin, fds = begins.get()
    torch.set_num_threads(begin.num_threads)
    build.load_native(
        is_reference_allowed=config.allow_reference_ops,
        progress=log.get_logger().info,
        device="cuda" if own.device.type == "cuda" else "cpu",
    )
    group = ProcessGroup(start.meeting, tp_rank, config.tensor_parallel_size, own.device)

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
    tell(Loaded(time.monotonic() - began_s))
    ring = Ring(fds, place_bytes=begin.place_bytes, num_places=begin.num_places)
    gc.collect()
    gc.freeze()
    stream: AbstractContextManager[object] = nullcontext()
    if own.device.type == "cuda":
        torch.cuda.synchronize(own.device)
        own_stream = torch.cuda.Stream(own.device)  # type: ignore[no-untyped-call]
        stream = torch.cuda.stream(own_stream)
    while True:
        call = msgspec.msgpack.decode(ring.get(tp_rank - 1), type=calls.AnyCall)
        if isinstance(call, calls.AllocateKV):  # as CudaRunner does
            executor.allocate_kv(call.num_blocks)
        elif isinstance(call, calls.TakeModel):
            executor.take_model(load)
        elif isinstance(call, calls.Measure):
            assert isinstance(own.memory, CardMemory)
            now = devices.card_memory(own.device)
            tell(Shown(now.total_bytes, own.memory.used_bytes, now.used_bytes))
        else:
            with stream:
                _make(call, executor)
            continue
        if own.device.type == "cuda":
            torch.cuda.synchronize(own.device)


def _make(call: calls.AnyCall, executor: StepExecutor) -> None:
    """A call that needs the executor alone."""
    match call:
        case calls.Bring(words):
            executor.bring(torch.frombuffer(bytearray(words), dtype=torch.int32))
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
