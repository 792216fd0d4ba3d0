"""What masks cost the steps of a card, on a machine without one: the engine on a clock.

    python -m bench.mask_steps

The engine, its mask threads and the frames of 64 streams are real; the card is a clock that takes
--forward-ms for a forward pass and --sampling-ms for the sampling behind it, and tells the loop
when a step has ended, as a card does. Its draws are the tokens of a document that the grammar
allows, from another place on for each stream. Prints the milliseconds of a step, median and p90,
and how long the card stood idle in it, without constraints and with each of some.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench.make_model import make_model
from bench.report import busy_remark, format_table
from pyserve.api.endpoints.answer import Head
from pyserve.api.endpoints.chat import ChatFrames
from pyserve.api.generation.generate import Generation
from pyserve.api.generation.job import Ending, Job, Prompt
from pyserve.client import Constraint, EngineInfo
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import Step, StepOutput, max_step_words, max_update_words, pack
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.engine import Engine, Pending
from pyserve.engine.masks import bitmask_words
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.metrics import Metrics
from pyserve.ops import build
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.grammar import Grammars, JsonSchema, Regex, Spec
from pyserve.text.grammar_vocabulary import Vocabulary
from pyserve.text.tokenizer import Tokenizer

MAX_MODEL_LEN = 4096
BLOCK_SIZE = 16
PEOPLE = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}
WORDS = "the quick brown fox jumps over the last dog and then " * 37
SPECS: tuple[tuple[str, Spec, str], ...] = (
    (
        "an array of {name, age}",
        JsonSchema(param="schema", schema=PEOPLE),
        json.dumps([{"name": "John Smith of the north", "age": age} for age in range(400)]),
    ),
    (
        "[a-z ]{2000}",
        Regex(param="regex", pattern="[a-z ]{2000}"),
        WORDS,
    ),
)


class Clock:
    """Implements engine.Runner: a card that computes nothing and takes its time.

    document     token ids that every sequence draws, each from its own place in `starts` on.
    steps        of each that has ended: when, and how long the card was idle before its sampling
                 and before its forward pass, in seconds.
    """

    run_ahead_depth = 1
    step_deadline_s: float | None = None
    num_device_allocations = 0

    def __init__(self, num_slots: int, vocab_size: int, *, forward_s: float, sampling_s: float):
        self.document: list[int] = []
        self.starts: dict[int, int] = {}
        self.steps: list[tuple[float, float, float]] = []
        self._forward_s, self._sampling_s = forward_s, sampling_s
        self._free_s = 0.0  # when the card has done all that it was given
        self._words = np.zeros(
            max_step_words(
                num_slots, num_slots, max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE
            ),
            np.int32,
        )
        self._bitmask = np.zeros((num_slots, bitmask_words(vocab_size)), np.int32)
        self._timer = _Timer()
        self._in_flight: deque[tuple[float, Step, asyncio.Future[StepOutput]]] = deque()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.add_reader(self._timer.fd, self._on_time)

    def is_replayed(self, step: Step) -> bool:
        return True

    def launch(self, step: Step) -> Pending:
        pack(step, self._words)
        now_s = time.monotonic()
        idle_s = max(0.0, now_s - self._free_s)
        self._free_s = max(now_s, self._free_s) + self._forward_s
        return Pending(partial(self._sample, step, idle_s), self._bitmask)

    def _sample(self, step: Step, idle_s: float, rows: object) -> asyncio.Future[StepOutput]:
        now_s = time.monotonic()
        stall_s = max(0.0, now_s - self._free_s)
        self._free_s = max(now_s, self._free_s) + self._sampling_s
        result: asyncio.Future[StepOutput] = self._loop.create_future()
        self.steps.append((self._free_s, stall_s, idle_s))
        self._in_flight.append((self._free_s, step, result))
        if len(self._in_flight) == 1:
            self._timer.set(self._free_s)
        return result

    def _on_time(self) -> None:
        self._timer.clear()
        while self._in_flight and self._in_flight[0][0] <= time.monotonic():
            _, step, result = self._in_flight.popleft()
            result.set_result(StepOutput([[self._next(seq.stream.seq_id)] for seq in step.seqs]))
        if self._in_flight:
            self._timer.set(self._in_flight[0][0])

    def _next(self, seq_id: int) -> int:
        place = self.starts[seq_id]
        self.starts[seq_id] += 1
        return self.document[place]

    def run(self, step: Step) -> StepOutput:
        raise NotImplementedError

    def close(self) -> None:
        self._loop.remove_reader(self._timer.fd)
        os.close(self._timer.fd)


class _Timer:
    """A file that is readable from a time on: the loop's own timers are whole milliseconds."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)

    def set(self, at_s: float) -> None:
        seconds, fraction = divmod(at_s, 1.0)
        times = (ctypes.c_long * 4)(0, 0, int(seconds), int(fraction * 1e9))
        self._libc.timerfd_settime(self.fd, 1, times, None)  # TFD_TIMER_ABSTIME

    def clear(self) -> None:
        os.read(self.fd, 8)


async def steps_of(
    tokenizer: Tokenizer,
    make: Callable[[], Constraint | None],
    text: str,
    args: argparse.Namespace,
) -> list[tuple[float, float, float]]:
    """Clock.steps of --rows streams that run for --steps tokens."""
    forward_s, sampling_s = args.forward_ms / 1e3, args.sampling_ms / 1e3
    clock = Clock(args.rows, args.vocab_size, forward_s=forward_s, sampling_s=sampling_s)
    clock.document = tokenizer.encode(text, add_special_tokens=False)
    num_blocks = args.rows * (MAX_MODEL_LEN // BLOCK_SIZE)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True), SlotAllocator(args.rows),
        max_num_batched_tokens=args.rows,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
    )  # fmt: skip
    engine = Engine(
        scheduler, clock, max_model_len=MAX_MODEL_LEN, vocab_size=args.vocab_size, policy="fcfs"
    )
    info = EngineInfo(
        max_model_len=MAX_MODEL_LEN, vocab_size=args.vocab_size, max_num_seqs=args.rows,
        block_size=BLOCK_SIZE, num_blocks=num_blocks, dtype="bfloat16", device="clock",
    )  # fmt: skip
    client = AsyncEngine(engine, info)
    client.start()
    sink = os.open(os.devnull, os.O_WRONLY)
    streams = []
    for row in range(args.rows):
        start = row * min(100, len(clock.document) - args.steps) // args.rows
        clock.starts[row] = start
        constraint = make()
        if constraint is not None:
            constraint.accept(clock.document[:start])
        streams.append(_stream(client, tokenizer, constraint, args.steps, sink))
    await asyncio.gather(*streams)
    await client.stop()
    os.close(sink)
    return clock.steps


async def _stream(
    client: AsyncEngine, tokenizer: Tokenizer, constraint: Constraint | None, steps: int, sink: int
) -> None:
    """What a chat's stream does, but for HTTP: each frame is one write, outside the GIL."""
    prompt = Prompt([1], "", Detokenizer(tokenizer, [1], skip_special_tokens=True))
    job = Job(
        prompts=[prompt], params=[SamplingParams(max_tokens=steps)],
        ending=Ending([], False, None, 0), make_constraint=lambda: constraint,
    )  # fmt: skip
    generation = Generation(client, Metrics("m"), arrived_s=0.0)
    await generation.submit(job, cache_salt="", user="")
    frames = ChatFrames(Head("chatcmpl-0123456789abcdef", 1_764_331_200, "clock"), job)
    while generation.active:
        for choice, parts in await generation.read():
            for part in parts:
                os.write(sink, repr(frames.part(choice, part)).encode())


def _make(grammars: Grammars, spec: Spec | None) -> Constraint | None:
    return None if spec is None else grammars.compile(spec).constraint()


def main(argv: list[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=64)
    add("--vocab-size", type=int, default=128_256)
    add("--forward-ms", type=float, default=5.3)
    add("--sampling-ms", type=float, default=0.35)
    add("--steps", type=int, default=300)
    add("--runs", type=int, default=3)
    add("--pattern", metavar="REGEX", help="of `the quick brown fox ...`, in place of the others")
    args = parser.parse_args(argv)
    print(busy_remark(), end="")
    build.load_native(is_reference_allowed=False, progress=lambda line: None, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), "llama-3.1-8b", {"vocab_size": args.vocab_size}, has_weights=False)
        tokenizer = Tokenizer.from_folder(Path(folder))
    eos = tokenizer.eos_token_id
    assert eos is not None
    vocabulary = Vocabulary(tokenizer, vocab_size=args.vocab_size, eos_token_ids=[eos])
    grammars = Grammars(vocabulary)
    kinds: list[tuple[str, Spec | None, str]] = [("no constraint", None, SPECS[0][2]), *SPECS]
    if args.pattern is not None:
        kinds[1:] = [(args.pattern, Regex(param="regex", pattern=args.pattern), WORDS)]
    head = ["a step of the clock", "ms: median", "p90", "idle before S: median", "p90", "before F"]
    rows = [head]
    for _ in range(args.runs):
        for name, spec, text in kinds:
            run = steps_of(tokenizer, partial(_make, grammars, spec), text, args)
            steps = np.array(asyncio.run(run))[args.steps // 4 :]
            gaps = np.diff(steps[:, 0])
            cells = (
                np.median(gaps), np.quantile(gaps, 0.9), np.median(steps[:, 1]),
                np.quantile(steps[:, 1], 0.9), np.median(steps[:, 2]),
            )  # fmt: skip
            rows.append([name, *(f"{1e3 * cell:.2f}" for cell in cells)])
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
