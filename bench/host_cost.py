"""What the API itself costs the host: a delivered token, and a request's body.

    python -m bench.host_cost

No engine and no HTTP: tokens are put into the streams of 64 requests, read and made into frames;
bodies are decoded. Processor time, the least of `--runs`; to compare two commits run both in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyserve
from bench.report import busy_remark, format_table
from pyserve.api.endpoints.answer import Head
from pyserve.api.endpoints.body import Wire
from pyserve.api.endpoints.chat import ChatFrames
from pyserve.api.endpoints.completions import CompletionFrames
from pyserve.api.generation.generate import Generation
from pyserve.api.generation.job import Ending, Job, Prompt
from pyserve.api.generation.stream import Frames
from pyserve.api.wire.protocol import ChatRequest, CompletionRequest
from pyserve.client import SequenceRequest, SequenceStream
from pyserve.metrics import Metrics
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.reasoning import ReasoningParser
from pyserve.text.tokenizer import Tokenizer

NUM_STREAMS = 64
TEXT = "The capital of France is Paris, a large city on the river Seine. "
HEAD = Head("chatcmpl-0123456789abcdef", 1_764_331_200, "pyserve-demo")
LONG = [{"role": ("user", "assistant")[i % 2], "content": TEXT * 9} for i in range(60)]
PARTS = [{"role": "user", "content": [{"type": "text", "text": TEXT * 4}]} for _ in range(60)]
UNKNOWN = [{**message, "cache_control": {"type": "ephemeral"}} for message in PARTS]
CHAT, COMPLETION = Wire(ChatRequest), Wire(CompletionRequest)
BODIES: tuple[tuple[str, Wire[Any], dict[str, object]], ...] = (
    ("a small chat", CHAT, {"messages": PARTS[:1], "max_tokens": 64, "stream": True}),
    ("60 messages", CHAT, {"messages": LONG}),
    ("60 messages of parts", CHAT, {"messages": PARTS}),
    ("an unknown field in each", CHAT, {"messages": UNKNOWN}),
    ("4,096 token ids", COMPLETION, {"prompt": list(range(4096))}),
)


class _Engine:
    """Takes sequences and does nothing with them."""

    def submit(self, request: SequenceRequest) -> SequenceStream:
        return SequenceStream(0, len(request.prompt_token_ids))


async def token_us(
    tokenizer: Tokenizer,
    stop: list[str],
    make_frames: Callable[[Job], Frames] | None,
    steps: int,
    *,
    thinks: bool = False,
) -> float:
    """Microseconds of one token in put, read and, where there are any, frames."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    prompt = Prompt(ids, "", Detokenizer(tokenizer, ids, skip_special_tokens=True))
    params = SamplingParams(max_tokens=steps + 1)
    parser = ReasoningParser("deepseek_r1", tokenizer)
    job = Job(
        prompts=[prompt],
        params=[params],
        ending=Ending(stop, False, None, 0),
        make_reasoning=partial(parser.stage, "open") if thinks else None,
    )
    pairs = []
    for _ in range(NUM_STREAMS):
        generation = Generation(_Engine(), Metrics("m"), arrived_s=0.0)  # type: ignore[arg-type]
        await generation.submit(job, cache_salt="", user="")
        pairs.append((generation, make_frames(job) if make_frames else None))
    streams = [generation.choices[0].stream for generation, _ in pairs]
    began_ns = time.process_time_ns()
    for step in range(steps):
        for stream in streams:
            stream.put([ids[step % len(ids)]])
        for generation, frames in pairs:
            for choice, parts in await generation.read():
                if frames is not None:
                    for part in parts:
                        frames.part(choice, part)
    return (time.process_time_ns() - began_ns) / 1000 / steps / NUM_STREAMS


def body_us(wire: Wire[Any], body: bytes, times: int) -> float:
    """Microseconds of one decoding."""
    began_ns = time.process_time_ns()
    for _ in range(times):
        wire.decode(body, max_list_ids=2**17)
    return (time.process_time_ns() - began_ns) / 1000 / times


def main(argv: list[str] | None = None) -> int:
    """Prints two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000, help="tokens of a stream, or bodies")
    args = parser.parse_args(argv)
    print(busy_remark(), end="")
    tokenizer = Tokenizer.from_folder(Path(pyserve.__file__).parent / "demo")
    rows = [["a token of one of 64 streams", "us"]]
    kinds: tuple[tuple[str, list[str], Callable[[Job], Frames] | None], ...] = (
        ("put and read", [], None),
        ("with a stop string", ["\n\nUser:"], None),
        ("with its chat frame", [], lambda job: ChatFrames(HEAD, job)),
        ("with its completion frame", [], lambda job: CompletionFrames(HEAD, job)),
    )
    for name, stop, make in kinds:
        costs = [asyncio.run(token_us(tokenizer, stop, make, args.steps)) for _ in range(args.runs)]
        rows.append([name, f"{min(costs):.2f}"])
    chat = kinds[2][2]
    costs = [
        asyncio.run(token_us(tokenizer, [], chat, args.steps, thinks=True))
        for _ in range(args.runs)
    ]
    rows.append(["of thinking, with its chat frame", f"{min(costs):.2f}"])
    print(format_table(rows))
    rows = [["a body", "bytes", "us"]]
    for name, wire, value in BODIES:
        body = json.dumps(value).encode()
        cost = min(body_us(wire, body, args.steps) for _ in range(args.runs))
        rows.append([name, f"{len(body):,}", f"{cost:.1f}"])
    print(f"\n{format_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
