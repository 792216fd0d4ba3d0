"""What the scheduler makes of a load: the engine on a clock that knows how long steps take.

    python -m bench.step_model --loads 1024/256x32 128/512x256

Scheduler and chunk pacer are the server's own. A card is a table of how long a step of so many
tokens took an 8B model on an H200 (bench/notes.md), and the bytes and FLOPs of attention. Prompts
come as in `bench.serve`, each when another has ended. It says which shapes steps run in, how many
of their tokens are padding, and what a user would see; it knows nothing of the host, and a figure
of it is no measurement: it is for comparing one way to schedule with another.
"""

from __future__ import annotations

import argparse
import random
import sys
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from statistics import median

from bench.gpu_serve import parse_load
from bench.report import format_table
from pyserve.client import SequenceRequest
from pyserve.engine.batch import Step, StepOutput, max_update_words, padded_size
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.chunks import ChunkPacer
from pyserve.engine.engine import Engine, Pending
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.params import SamplingParams

BLOCK_SIZE = 16
MAX_MODEL_LEN = 2**17
MAX_TOKENS = 8192  # of a step
NUM_SLOTS = 256
NUM_BLOCKS = 60_000  # about what an 8B leaves of an H200
VOCAB_SIZE = 1000
# (tokens of a step, its milliseconds without attention) of Llama-3.1-8B in bfloat16. From 1,024 on
# they are those of one prompt of so many tokens, from the first to the last kernel of its step
# (`bench.gpu_profile --loads 1x1024p` and so on, 2026-11-30), less its attention as FLOPS has it.
STEP_MS = (
    (1, 3.65), (8, 3.8), (16, 4.0), (32, 4.9), (64, 5.1), (128, 5.7), (256, 7.0), (512, 11.3),
    (1024, 20.4), (1152, 23.8), (1280, 25.5), (1408, 29.6), (1536, 32.8), (1792, 37.1),
    (2048, 42.6), (8192, 165.6),
)  # fmt: skip
KV_BYTES = 131_072  # of a token of context, all layers
BYTES_PER_MS = 4.1e9  # of decode attention
FLOPS = 524_288  # of prefill attention, for each key that a query sees, all layers
FLOPS_PER_MS = 560e9

DEFAULT_LOADS = ((1024, 256, 32), (1024, 256, 256), (128, 512, 64), (128, 512, 256))
NUM_SHAPES = 8  # of a row of the table, those with the most tokens
HEADER = (
    "in/out, users", "output tok/s", "total tok/s", "TTFT p50 ms", "ITL p50 ms", "longest gap ms",
    "padding", "steps by shape",
)  # fmt: skip


@dataclass(slots=True)
class Figures:
    """What the users and the clock have seen of one load; milliseconds of the clock."""

    end_ms: float = 0.0
    num_ended: int = 0
    num_tokens: int = 0  # that steps ran
    num_padded: int = 0  # the same with padding
    shapes: Counter[int] = field(default_factory=Counter)
    ttft_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)


class NoCard:
    """Implements engine.Runner for an engine whose steps are only counted."""

    run_ahead_depth = 1
    step_deadline_s: float | None = None
    num_device_allocations = 0

    def attach(self, loop: object) -> None: ...

    def is_replayed(self, step: Step) -> bool:
        return True

    def launch(self, step: Step) -> Pending:
        raise NotImplementedError

    def run(self, step: Step) -> StepOutput:
        raise NotImplementedError

    def close(self) -> None: ...


def duration_ms(step: Step) -> float:
    """How long the card would take for it."""
    size = padded_size(step.num_tokens, MAX_TOKENS)
    index = max(1, bisect_left(STEP_MS, (size, 0.0)))
    (below, below_ms), (above, above_ms) = STEP_MS[index - 1 : index + 1]
    ms = below_ms + (above_ms - below_ms) * (size - below) / (above - below)
    for seq_len, query_len in zip(step.seq_lens, step.query_lens, strict=True):
        ms += seq_len * KV_BYTES / BYTES_PER_MS
        if query_len > 1:
            ms += query_len * (seq_len - query_len / 2) * FLOPS / FLOPS_PER_MS
    return ms


def make_engine(target_itl_ms: int) -> Engine:
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=False),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=MAX_TOKENS,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
    )
    pacer = ChunkPacer(target_itl_ms / 1e3, max_tokens=MAX_TOKENS) if target_itl_ms else None
    return Engine(
        scheduler, NoCard(), max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, policy="fcfs",
        pacer=pacer,
    )  # fmt: skip


def serve(
    load: tuple[int, int, int], *, num_requests: int, target_itl_ms: int, seed: int = 0
) -> Figures:
    """Serve num_requests of `load` = (prompt tokens, output tokens, users).

    A step is scheduled before the one in front of it has been accounted for, as a card's is, so
    who comes during a step is in the next but one.
    """
    input_len, output_len, num_to_send = load
    params = SamplingParams(max_tokens=output_len)
    engine, rng, figures = make_engine(target_itl_ms), random.Random(seed), Figures()
    last_ms: dict[int, float] = {}  # of each sequence: when it was sent, then its last token
    started: set[int] = set()
    before: Step | None = None
    while figures.num_ended < num_requests:
        for _ in range(num_to_send):
            prompt = [rng.randrange(VOCAB_SIZE) for _ in range(input_len)]
            stream = engine.add(SequenceRequest(prompt, params))
            last_ms[stream.seq_id] = figures.end_ms
        step = engine.schedule()
        if step is not None:
            size = padded_size(step.num_tokens, MAX_TOKENS)
            figures.num_tokens += step.num_tokens
            figures.num_padded += size
            figures.shapes[size] += 1
        num_ended = engine.num_finished
        if before is not None:
            took_ms = duration_ms(before)
            figures.end_ms += took_ms
            engine.note_duration(before, took_ms / 1e3)
            sampled = list(compress(before.seqs, before.row_samples))
            engine.update(before, StepOutput([[0]] * len(sampled)))
            for seq_id in (seq.stream.seq_id for seq in sampled):
                gaps_ms = figures.gaps_ms if seq_id in started else figures.ttft_ms
                gaps_ms.append(figures.end_ms - last_ms[seq_id])
                last_ms[seq_id] = figures.end_ms
                started.add(seq_id)
        num_to_send = engine.num_finished - num_ended
        figures.num_ended += num_to_send
        before = step
    return figures


def table_row(load: tuple[int, int, int], figures: Figures) -> list[str]:
    input_len, output_len, num_users = load
    rate = figures.num_ended / figures.end_ms * 1e3
    often = sorted(figures.shapes.items(), key=lambda item: -item[0] * item[1])[:NUM_SHAPES]
    return [
        f"{input_len}/{output_len}x{num_users}",
        f"{rate * output_len:,.0f}",
        f"{rate * (input_len + output_len):,.0f}",
        f"{median(figures.ttft_ms):.0f}",
        f"{median(figures.gaps_ms):.1f}",
        f"{max(figures.gaps_ms):.0f}",
        f"{figures.num_padded / figures.num_tokens - 1:.1%}",
        " ".join(f"{size}: {count}" for size, count in sorted(often)),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--loads", nargs="+", type=parse_load, default=[*DEFAULT_LOADS], metavar="IN/OUTxC")
    add("--rounds", type=int, default=4, help="requests of each user")
    add("--target-itl-ms", type=int, default=36)
    args = parser.parse_args(argv)
    rows = [
        table_row(
            load,
            serve(load, num_requests=args.rounds * load[2], target_itl_ms=args.target_itl_ms),
        )
        for load in args.loads
    ]
    print(format_table([HEADER, *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
