"""What pyserve computes with a checkpoint: run by full_size.py, in a process of its own.

    python -m bench.full_size_ours FOLDER OUT --device cuda --prompt-len 512 --num-steps 64

Writes token ids and logits to OUT (torch.save) and prints one JSON object: how long loading took
and what host memory it needed. A process of its own, so that its peak is that of loading.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from bench.server_process import memory_of
from pyserve.client import SequenceRequest
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager, num_blocks_for
from pyserve.engine.cpu_runner import CpuRunner
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine, Runner
from pyserve.engine.executor import StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.model.config import ModelConfig
from pyserve.model.context import ForwardContext
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.ops import build
from pyserve.params import SamplingParams

BLOCK_SIZE = 16
NUM_SLOTS = 4
LOGITS_TILE_ROWS = 4


class AnonymousPeak:
    """Largest RssAnon of this process while the block runs, looked at every 2 ms."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.num_bytes = max(self.num_bytes, rss_anonymous())


def rss_anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def load(folder: Path, device: torch.device) -> tuple[Decoder, dict[str, float]]:
    """The model in bfloat16, and bytes and seconds of loading it; the device is ready before."""
    config = ModelConfig.from_path(folder)
    torch.zeros(1, device=device)
    before = memory_of(os.getpid())
    started_s = time.perf_counter()
    with AnonymousPeak() as peak:
        decoder = load_model(
            folder, config, Placement(torch.bfloat16, device), load_format="auto", seed=0,
            progress=lambda done, total: None,
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started_s
    after = memory_of(os.getpid())
    num_bytes = sum(place.nbytes for place in decoder.destinations().values())
    return decoder, {
        "load_s": seconds,
        "weight_bytes": num_bytes,
        "gb_per_s": num_bytes / seconds / 1e9,
        "anonymous_before": before.anonymous_bytes,
        "anonymous_peak": max(peak.num_bytes, after.anonymous_bytes),
        "rss_before": before.rss_bytes,
        "peak_rss": after.peak_bytes,  # VmHWM
    }


def make_engine(decoder: Decoder, *, max_model_len: int, max_num_batched_tokens: int) -> Engine:
    """An engine for one sequence of max_model_len tokens, ready to run."""
    executor = StepExecutor(
        decoder,
        StepLimits(
            block_size=BLOCK_SIZE,
            num_slots=NUM_SLOTS,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            logits_tile_rows=LOGITS_TILE_ROWS,
        ),
    )
    num_blocks = num_blocks_for(max_model_len, BLOCK_SIZE) + NUM_SLOTS
    runner: Runner
    if decoder.device.type == "cuda":
        cuda_runner = CudaRunner(executor, is_eager=True)  # `generate` listens to its calls
        cuda_runner.allocate_kv(num_blocks)
        runner = cuda_runner
    else:
        executor.allocate_kv(num_blocks)
        runner = CpuRunner(executor, num_threads=torch.get_num_threads())
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=False),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=max_num_batched_tokens,
        max_update_words=max_update_words(max_model_len, BLOCK_SIZE),
    )
    return Engine(
        scheduler, runner, max_model_len=max_model_len, vocab_size=decoder.config.vocab_size,
        policy="fcfs",
    )  # fmt: skip


@torch.inference_mode()
def generate(
    decoder: Decoder, engine: Engine, prompt: list[int], num_steps: int
) -> tuple[list[int], torch.Tensor]:
    """Tokens of the prompt and of num_steps more, and their logits [num_tokens, vocab_size].

    The logits come from the hidden states of the engine's own steps, chunks of the prompt and
    decoding, at every position. Tokens are drawn at temperature 1: the steps see many different
    ones.
    """
    forward = decoder.forward
    hidden_states: list[torch.Tensor] = []

    def spy(ctx: ForwardContext) -> torch.Tensor:
        hidden_states.append(forward(ctx))
        return hidden_states[-1]

    decoder.forward = spy  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=num_steps + 1, temperature=1.0, seed=1)
    stream = engine.add(SequenceRequest(prompt, params))
    rows: list[torch.Tensor] = []
    while (step := engine.schedule()) is not None:
        output = engine.runner.run(step)
        hidden = hidden_states.pop()[: step.num_tokens]
        logits = hidden.new_empty(step.num_tokens, decoder.config.vocab_size)
        decoder.compute_logits(hidden, logits)
        rows.append(logits.cpu())
        engine.update(step, output)
    decoder.forward = forward  # type: ignore[method-assign]
    delta = stream.take()
    assert delta is not None and len(delta.token_ids) == num_steps + 1
    return prompt + delta.token_ids[:-1], torch.cat(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?", help="absent: load only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--num-steps", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    args = parser.parse_args(argv)
    build.load_native(
        is_reference_allowed=False,
        progress=lambda line: print(line, file=sys.stderr),
        device=args.device,
    )
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    decoder, figures = load(args.folder, device)
    if args.out is not None:
        started_s = time.perf_counter()
        engine = make_engine(
            decoder,
            max_model_len=args.prompt_len + args.num_steps + 1,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        figures["warmup_s"] = time.perf_counter() - started_s
        generator = torch.Generator().manual_seed(7)
        size = (args.prompt_len,)
        prompt = torch.randint(decoder.config.vocab_size, size, generator=generator).tolist()
        started_s = time.perf_counter()
        token_ids, logits = generate(decoder, engine, prompt, args.num_steps)
        figures["steps_s"] = time.perf_counter() - started_s
        torch.save({"token_ids": token_ids, "logits": logits}, args.out)
        engine.runner.close()
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
