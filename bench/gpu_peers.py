"""What a sum over the cards of one machine takes: `python -m bench.gpu_peers`; --cards 2, 4 or 8.

One process a card, CUDA graphs. Each size of message in one shot, in two shots, and by NCCL through
torch.distributed; those of up to 16,384 elements as the rows of one step too, with residual and
norm in the same kernel, beside NCCL and the norm. us a call, of the slowest rank. The floor is the
bytes that a card must be sent at the rate of its links, and one trip: --link-gbps and --trip-us.

The last lines say up to which size one shot was the fastest, and two: what LIMITS in
pyserve/ops/peer_layout.py should hold. The limits are wider here than there. Then what the leader
takes to get the others' logits, of so many rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench.report import environment, format_table, write_json
from pyserve import ops
from pyserve.ops import build, peer_layout
from pyserve.ops.group import LEADER
from pyserve.ops.native import native
from pyserve.ops.peer_layout import PeerLimits
from pyserve.ops.peers import PeerGroup, exchange_over

SIZES = [8 << 10 << step for step in range(12)]  # bytes, 8 KiB .. 16 MiB
HIDDEN, MAX_ONE_SHOT, MAX_TWO_SHOT = 4096, 4 << 20, 16 << 20
MAX_NORM = 2 << 20  # of a message with a norm: 256 rows, a CTA each
LOGIT_ROWS, VOCAB_SIZE = (1, 64, 256), 128256
NUM_REPLAYS, GRAPH_US = 30, 2000
# NVLink multicast can take the cards of a shared host out of service.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
Row = dict[str, float | None]


def time_calls(call: Callable[[], object], num_bytes: int) -> float:
    """us a call; all ranks make as many."""
    num_calls = max(4, min(100, int(GRAPH_US / (10 + num_bytes / 100_000))))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread asks for its events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(num_calls):
            call()
    times = []
    with torch.cuda.stream(stream):
        for _ in range(NUM_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / num_calls)
    return statistics.median(times)


def measure(group: PeerGroup, num_bytes: int, device: torch.device) -> Row:
    """us of each way that such a message can go."""
    x = 1e-3 * torch.randn(num_bytes // 2, dtype=torch.bfloat16, device=device)
    table = group.table
    ways: dict[str, Callable[[], object] | None] = {
        "one shot": lambda: native.all_reduce_one_shot(x, table),
        "two shots": lambda: native.all_reduce_two_shot(x, table),
        "NCCL": lambda: dist.all_reduce(x),
    }
    if num_bytes > MAX_ONE_SHOT:
        ways["one shot"] = None
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
    rows = x.view(-1, HIDDEN)
    residual, out = torch.randn_like(rows), torch.empty_like(rows)
    ways |= {"with norm": None, "NCCL, then norm": None}
    if num_bytes <= MAX_NORM:
        ways["with norm"] = lambda: native.all_reduce_add_norm(
            rows, residual, weight, 1e-5, 0.0, out, table
        )

        def plain(rows: Tensor = rows) -> None:
            dist.all_reduce(rows)
            ops.add_rms_norm(rows, residual, weight, 1e-5, out)

        ways["NCCL, then norm"] = plain
    return {
        name: None if call is None else time_calls(call, num_bytes) for name, call in ways.items()
    }


def measure_gather(group: PeerGroup, num_rows: int, device: torch.device) -> float:
    """us of the logits of so many rows, each rank with its part of the vocabulary."""
    shape = (group.tp_size, num_rows, VOCAB_SIZE // group.tp_size)
    parts = torch.randn(shape, dtype=torch.bfloat16, device=device)
    out = parts if group.tp_rank == LEADER else None
    num_bytes = 2 * num_rows * VOCAB_SIZE // group.tp_size
    return time_calls(lambda: group.gather_parts(parts[0], out), num_bytes)


def run_rank(tp_rank: int, tp_size: int, folder: str) -> None:
    """A rank's process; leaves its rows in the folder."""
    limits = PeerLimits(one_shot=MAX_ONE_SHOT, two_shot=MAX_TWO_SHOT, gather=4 << 20)
    peer_layout.LIMITS[tp_size] = limits
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")
    store = dist.FileStore(f"{folder}/store", tp_size)  # type: ignore[attr-defined]
    exchange = exchange_over(store, tp_rank, tp_size)
    group = PeerGroup(tp_rank, tp_size, device, exchange)
    if group.reason is not None:
        raise SystemExit(group.reason)
    dist.init_process_group(
        "nccl", store=store, rank=tp_rank, world_size=tp_size, device_id=device,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    rows = [measure(group, num_bytes, device) for num_bytes in SIZES]
    rows.append({str(num): measure_gather(group, num, device) for num in LOGIT_ROWS})
    Path(folder, f"{tp_rank}.json").write_text(json.dumps(rows))
    torch.cuda.synchronize()
    exchange(b"done")
    dist.destroy_process_group()
    group.close()


def run_ranks(tp_size: int) -> list[Row]:
    """What the slowest rank took, by size."""
    os.environ.update(NO_MULTICAST)
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")  # compiled once
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=run_rank, args=(tp_rank, tp_size, folder))
            for tp_rank in range(tp_size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(240)
        finally:
            for process in processes:
                process.kill()
        if any(process.exitcode != 0 for process in processes):
            raise SystemExit(f"ranks ended with {[p.exitcode for p in processes]}")
        per_rank = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(tp_size)]
    return [
        {name: max((row[name] for row in rows), key=lambda us: us or 0.0) for name in rows[0]}
        for rows in zip(*per_rank, strict=True)
    ]


def print_table(rows: list[Row], tp_size: int, link_gbps: float, trip_us: float) -> None:
    names = list(rows[0])
    shown = [["KiB", *names, "floor"]]
    for num_bytes, row in zip(SIZES, rows, strict=True):
        sent = num_bytes * 2 * (tp_size - 1) / tp_size  # what any way must send a card
        floor = trip_us + sent / (link_gbps * 1e3)
        cells = [row[name] for name in names]
        words = ["" if us is None else f"{us:.1f}" for us in cells]
        shown.append([f"{num_bytes >> 10}", *words, f"{floor:.1f}"])
    print(format_table(shown))
    first = rows[0]
    print(f"= {tp_size} cards, 8 KiB: {first['one shot']:.1f} us, NCCL {first['NCCL']:.1f}")
    print(f"= with residual and norm: {first['with norm']:.1f} us (goal 7), "
          f"NCCL {first['NCCL, then norm']:.1f}")  # fmt: skip
    for name, others in (("one shot", ("two shots", "NCCL")), ("two shots", ("NCCL",))):
        fastest = [
            num_bytes
            for num_bytes, row in zip(SIZES, rows, strict=True)
            if row[name] is not None and all((row[name] or 0) <= (row[o] or 0) for o in others)
        ]
        most = f"{max(fastest) >> 10} KiB" if fastest else "no size"
        print(f"= {name} fastest of {' and '.join((name, *others))} up to {most}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cards", type=int, default=2, choices=sorted(peer_layout.LIMITS))
    parser.add_argument("--link-gbps", type=float, default=450.0, help="one direction, all links")
    parser.add_argument("--trip-us", type=float, default=1.5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if torch.cuda.device_count() < args.cards:
        raise SystemExit(f"{args.cards} cards are needed, {torch.cuda.device_count()} are here")
    *rows, gathers = run_ranks(args.cards)
    print_table(rows, args.cards, args.link_gbps, args.trip_us)
    for num_rows, us in gathers.items():
        print(f"= the logits of {num_rows} rows to the leader: {us:.1f} us")
    named = [{"bytes": num_bytes, **row} for num_bytes, row in zip(SIZES, rows, strict=True)]
    write_json(
        args.json,
        {
            "cards": args.cards,
            "rows": named,
            "gathers": gathers,
            "environment": environment(["torch"]),
        },
    )


if __name__ == "__main__":
    main()
