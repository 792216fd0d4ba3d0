"""What the masks of constrained sequences cost a step, without a model.

    python -m bench.mask_cost

64 answers by a JSON schema, each at another place of the same document, over a synthetic tokenizer
of 128k tokens. A row's figures are processor time; a step's are the wall time of the engine's own
mask threads, the least of `--runs`, beside their floor: copying as many bytes. Masks of one
compiled grammar are filled on one thread, so each thread has a grammar of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.make_model import make_model
from bench.report import busy_remark, format_table, summarize
from pyserve.client import SequenceStream
from pyserve.engine.batch import Step
from pyserve.engine.masks import MaskWorkers, bitmask_words
from pyserve.engine.sequence import Sequence as EngineSequence
from pyserve.params import SamplingParams
from pyserve.text.grammar import Compiled, JsonSchema, compile_grammar
from pyserve.text.grammar_constraint import GrammarConstraint
from pyserve.text.grammar_vocabulary import Vocabulary
from pyserve.text.tokenizer import Tokenizer

TEXT = {"type": "string"}
ADDRESS = {"street": TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": TEXT},
        "address": {"type": "object", "properties": ADDRESS, "required": list(ADDRESS)},
    },
    "required": ["name", "age", "tags", "address"],
}
DOCUMENT = {
    "name": "John Smith of the north",
    "age": 30,
    "tags": ["engineer", "software", "quantum computing"],
    "address": {"street": "1 Main Street", "zip": "12345"},
}


def row_us(compiled: Compiled, token_ids: Sequence[int]) -> tuple[list[float], list[float]]:
    """Microseconds of each mask of one answer, and of accepting each of its tokens."""
    constraint = compiled.constraint()
    words = np.empty(bitmask_words(compiled.vocabulary.vocab_size), np.int32)
    masks, accepts = [], []
    for token_id in token_ids:
        times = [time.thread_time_ns()]
        constraint.fill_bitmask(words)
        times.append(time.thread_time_ns())
        constraint.accept([token_id])
        times.append(time.thread_time_ns())
        masks.append((times[1] - times[0]) / 1000)
        accepts.append((times[2] - times[1]) / 1000)
    assert constraint.error is None, constraint.error
    return masks, accepts


def step_of(constraints: Sequence[GrammarConstraint]) -> Step:
    """A step that samples a row for each."""
    step = Step()
    for number, constraint in enumerate(constraints):
        step.seqs.append(
            EngineSequence(
                stream=SequenceStream(number, 1), params=SamplingParams(max_tokens=1),
                token_ids=[0], num_prompt_tokens=1, max_total_tokens=2, order=(0, number), seed=0,
                stop_token_ids=frozenset(), root_hash=b"", num_tokens=2, constraint=constraint,
            )
        )  # fmt: skip
        step.generations.append(-1)
        step.row_samples.append(True)
    return step


async def step_us(step: Step, vocab_size: int, *, num_threads: int, runs: int) -> float:
    """Microseconds until all masks of `step` are filled."""
    workers = MaskWorkers(num_threads, vocab_size)
    bitmask = np.zeros((len(step.seqs), bitmask_words(vocab_size)), np.int32)
    times = []
    for _ in range(runs):
        began_ns = time.perf_counter_ns()
        filling = workers.fill(step, bitmask)
        assert len(filling.masked_rows) == len(step.seqs) and not await filling.wait()
        times.append((time.perf_counter_ns() - began_ns) / 1000)
    workers.close()
    return min(times)


def copy_us(num_rows: int, vocab_size: int, runs: int) -> float:
    """Microseconds of copying as many bytes as the masks of a step have."""
    source = np.ones((num_rows, bitmask_words(vocab_size)), np.int32)
    target = np.zeros_like(source)
    times = []
    for _ in range(runs):
        began_ns = time.perf_counter_ns()
        np.copyto(target, source)
        times.append((time.perf_counter_ns() - began_ns) / 1000)
    return min(times)


def main(argv: list[str] | None = None) -> int:
    """Prints two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=100)
    args = parser.parse_args(argv)
    print(busy_remark(), end="")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), "llama-3.1-8b", {"vocab_size": args.vocab_size}, has_weights=False)
        tokenizer = Tokenizer.from_folder(Path(folder))
    eos = tokenizer.eos_token_id
    assert eos is not None
    vocabulary = Vocabulary(tokenizer, vocab_size=args.vocab_size, eos_token_ids=[eos])
    compiled = compile_grammar(JsonSchema(param="schema", schema=SCHEMA), vocabulary)
    token_ids = tokenizer.encode(json.dumps(DOCUMENT), add_special_tokens=False)
    rows = [["of one row, us", "mean", "p50", "p99", "max"]]
    for name, times in zip(("mask", "accept"), row_us(compiled, token_ids), strict=True):
        summary = summarize(times)
        assert summary is not None
        rows.append([name, *(f"{summary[key]:.1f}" for key in ("mean", "p50", "p99", "max"))])
    print(format_table(rows))
    floor = copy_us(args.rows, args.vocab_size, args.runs)
    rows = [[f"masks of {args.rows} rows", "us", "of the floor"], ["the floor", f"{floor:.0f}", ""]]
    spec = JsonSchema(param="schema", schema=SCHEMA)
    for num_threads in args.threads:
        copies = [compile_grammar(spec, vocabulary) for _ in range(num_threads)]
        constraints = [copies[number % num_threads].constraint() for number in range(args.rows)]
        for number, constraint in enumerate(constraints):
            constraint.accept(token_ids[: number * len(token_ids) // args.rows])
        step = step_of(constraints)
        took = asyncio.run(step_us(step, args.vocab_size, num_threads=num_threads, runs=args.runs))
        rows.append([f"{num_threads} threads", f"{took:.0f}", f"{took / floor:.1f} x"])
    print(f"\n{format_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
