"""Where a step's time goes on a card: its kernels by name, and what lies between them.

    python -m bench.make_model llama-3.1-8b /tmp/llama
    python -m bench.gpu_profile /tmp/llama --loads 64x384 256x384 1x1024p 1x8192p

ROWSxCONTEXT is a step in which so many sequences decode, with a `p` one in which such prompts come
whole. Steps are run one by one as the server runs them, small ones replayed. CUPTI watches them, by
torch.profiler: a kernel's time includes its wait for the one in front, where it is chained.

--tensor-parallel-size N: each of N processes schedules the same steps on a card of its own, and the
first one's kernels are shown: those that meet the others' include the wait for them.

--adapters N: each sequence uses one of N, of rank 16 on all matrices of the layers, in turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu_adapters import RANK, write_adapter
from pyserve.client import Adapter, SequenceRequest
from pyserve.config import TP_SIZES
from pyserve.engine.adapter_slots import AdapterSlots
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager, num_blocks_for
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.model.adapter_weights import read_adapter
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.ops import build
from pyserve.ops.card_group import join_group
from pyserve.ops.group import LEADER
from pyserve.params import SamplingParams

BLOCK_SIZE = 16
NUM_SLOTS = 256
MAX_TOKENS = 8192  # of a step
NUM_STEPS = 5  # of a load that decodes
MAX_OUTPUT = 64
NUM_ROWS = 14  # of the table


class Load(NamedTuple):
    num_rows: int
    context: int
    is_prompt: bool

    @classmethod
    def parse(cls, text: str) -> Load:
        match = re.fullmatch(r"(\d+)x(\d+)(p?)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"want ROWSxCONTEXT or ROWSxCONTEXTp, got {text}")
        return cls(int(match[1]), int(match[2]), bool(match[3]))


def make_engine(
    args: argparse.Namespace, num_blocks: int, placement: Placement
) -> tuple[Engine, Decoder]:
    """Random weights, no prefix cache; the runner is a CudaRunner with its records."""
    config = ModelConfig.from_path(args.folder).quantised_as(args.quantization)
    decoder = load_model(
        args.folder, config, placement,
        load_format="dummy", seed=0, progress=lambda done, total: None,
    )  # fmt: skip
    limits = StepLimits(
        block_size=BLOCK_SIZE, num_slots=NUM_SLOTS, max_num_batched_tokens=MAX_TOKENS,
        max_model_len=MAX_TOKENS + MAX_OUTPUT, logits_tile_rows=NUM_SLOTS,
    )  # fmt: skip
    runner = CudaRunner(StepExecutor(decoder, limits))
    runner.allocate_kv(num_blocks)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=False),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=MAX_TOKENS,
        max_update_words=max_update_words(limits.max_model_len, BLOCK_SIZE),
        adapters=AdapterSlots(args.adapters),
    )
    engine = Engine(
        scheduler, runner, max_model_len=limits.max_model_len,
        vocab_size=decoder.config.vocab_size, policy="fcfs",
    )  # fmt: skip
    return engine, decoder


def run_step(engine: Engine) -> bool:
    step = engine.schedule()
    if step is None:
        return False
    engine.update(step, engine.runner.run(step))
    return True


def make_adapters(folder: Path, decoder: Decoder, count: int) -> list[Adapter]:
    """`count` of the same numbers, as different to the engine as any."""
    if not count:
        return []
    weights = read_adapter(
        write_adapter(folder, decoder.config), decoder.adapter_targets(), max_rank=RANK,
        dtype=torch.bfloat16,
    )  # fmt: skip
    return [Adapter(f"a{i}", i + 1, weights) for i in range(count)]


def profile(engine: Engine, load: Load, adapters: list[Adapter]) -> str:
    """The table of one load."""
    num_tokens = 1 if load.is_prompt else MAX_OUTPUT  # enough that all decode at once
    for _ in range(2 if load.is_prompt else 1):  # the first warms up
        for row in range(load.num_rows):
            params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
            prompt = [(7 * row + i) % 1000 + 1 for i in range(load.context)]
            adapter = adapters[row % len(adapters)] if adapters else None
            engine.add(SequenceRequest(prompt, params, adapter=adapter))
        if load.is_prompt:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                while run_step(engine):
                    pass
    if not load.is_prompt:
        while len(engine.scheduler.waiting):
            run_step(engine)
        run_step(engine)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for _ in range(NUM_STEPS):
                run_step(engine)
        while run_step(engine):
            pass
    return format_times(load, seen, 1 if load.is_prompt else NUM_STEPS)


def format_times(load: Load, seen: torch.profiler.profile, num_steps: int) -> str:
    kernels = [e for e in seen.events() or [] if e.device_type.name == "CUDA"]
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    busy_us = 0.0
    reached = spans[0][0]
    for start, end in spans:
        busy_us += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[short_name(event.name)].append(event.time_range.end - event.time_range.start)
    total_us = (reached - spans[0][0]) / num_steps
    kind = "prompts" if load.is_prompt else "decoding"
    lines = [
        f"= {load.num_rows} x {load.context} {kind}: {total_us / 1e3:.2f} ms a step from first to "
        f"last kernel, {busy_us / num_steps / 1e3:.2f} busy"
    ]
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:NUM_ROWS]:
        total, count, mean = sum(times) / num_steps, len(times) / num_steps, sum(times) / len(times)
        lines.append(f"{total:10.1f} us {count:7.1f} x {mean:8.2f}  {name}")
    return "\n".join(lines)


def short_name(name: str) -> str:
    """Without arguments and namespaces, as many letters as fit a line."""
    name = re.sub(r"\(anonymous namespace\)::|pyserve::gpu::|void |at::native::", "", name)
    return name.split("(", 1)[0][:96]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--loads", nargs="+", type=Load.parse, required=True, metavar="ROWSxCONTEXT"
    )
    parser.add_argument("--tensor-parallel-size", type=int, choices=TP_SIZES, default=1)
    parser.add_argument("--quantization", choices=("awq", "fp8"))
    parser.add_argument("--adapters", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")  # compiled once
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        followers = [
            context.Process(target=run_rank, args=(args, f"{folder}/meeting", tp_rank), daemon=True)
            for tp_rank in range(1, args.tensor_parallel_size)
        ]
        for follower in followers:
            follower.start()
        run_rank(args, f"{folder}/meeting", LEADER)
        for follower in followers:
            follower.join(30)
    return 0


def run_rank(args: argparse.Namespace, meeting: str, tp_rank: int) -> None:
    """All loads on one card, together with the other ranks' processes."""
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")
    tp_size = args.tensor_parallel_size
    group = join_group(meeting, tp_rank, tp_size, device) if tp_size > 1 else None
    placement = Placement(
        torch.bfloat16, device, tp_rank=tp_rank, tp_size=tp_size, group=group,
        num_adapter_slots=args.adapters, max_adapter_rank=RANK if args.adapters else 0,
    )  # fmt: skip
    most = max(
        load.num_rows * num_blocks_for(load.context + MAX_OUTPUT, BLOCK_SIZE) for load in args.loads
    )
    engine, decoder = make_engine(args, most + NUM_SLOTS, placement)
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), decoder, args.adapters)
    for load in args.loads:
        table = profile(engine, load, adapters)
        if tp_rank == LEADER:
            print(table, flush=True)
    engine.runner.close()


if __name__ == "__main__":
    raise SystemExit(main())
