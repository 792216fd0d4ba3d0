"""What each rank does in tests of ops between ranks: a process of its own, with a card of its own
where there are as many; else they share one in turns. Run by test_peers.py, which imports no more.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pyserve import ops
from pyserve.ops import build, peer_layout, reference_comm
from pyserve.ops.peers import PeerGroup, exchange_over

DTYPES = (torch.bfloat16, torch.float16)
EPS = 1e-5


class Rank:
    """One rank, its group made."""

    def __init__(self, tp_rank: int, tp_size: int, meeting: Path, spin_s: float) -> None:
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.device = torch.device("cuda", tp_rank % torch.cuda.device_count())
        torch.cuda.set_device(self.device)
        build.load_native(is_reference_allowed=False, progress=print, device="cuda")
        store = dist.FileStore(str(meeting), tp_size)  # type: ignore[attr-defined]
        self.exchange = exchange_over(store, tp_rank, tp_size)
        self.group = PeerGroup(tp_rank, tp_size, self.device, self.exchange, spin_s=spin_s)
        assert self.group.reason is None, self.group.reason

    def payload(self, seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """What all ranks give: each knows it."""
        generator = torch.Generator().manual_seed(seed)
        parts = torch.randn((self.tp_size, *shape), generator=generator)
        return list((parts * 4).to(dtype).to(self.device).unbind())

    def agree(self, *results: Tensor) -> None:
        """All ranks have these bits."""
        own = hashlib.sha256()
        for result in results:
            own.update(result.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        assert len(set(self.exchange(own.digest()))) == 1, "ranks differ"


def test_sums(rank: Rank) -> None:
    limits = peer_layout.LIMITS[rank.tp_size]
    sizes = [8, 16, 1000, 4096, 12_344, limits.one_shot // 2, limits.one_shot // 2 + 8]
    sizes += [limits.one_shot // 2 + 8 * rank.tp_size - 8, 1_000_008, limits.two_shot // 2]
    for seed, size in enumerate(sizes):
        for dtype in DTYPES:
            parts = rank.payload(seed, size, dtype=dtype)
            expected = reference_comm.sum_parts(parts)
            own = parts[rank.tp_rank]
            rank.group.all_reduce_(own)
            assert torch.equal(own, expected), size
            rank.agree(own)


def test_sums_with_norm(rank: Rank) -> None:
    for seed, (num_rows, hidden) in enumerate(
        [(1, 8), (3, 72), (5, 1024), (1, 4096), (16, 4096), (1, 8192), (2, 16384), (300, 512),
         (64, 4096), (65, 4096), (200, 4096), (4, 16392)]
    ):  # fmt: skip
        for dtype in DTYPES:
            parts = rank.payload(seed, num_rows, hidden, dtype=dtype)
            residual, other = rank.payload(seed + 99, num_rows, hidden, dtype=dtype)[:2]
            weight, plain_residual = other[0].clone(), residual.clone()
            plain = ops.add_rms_norm(
                reference_comm.sum_parts(parts), plain_residual, weight, EPS, offset=1.0
            )
            out = torch.full_like(plain, torch.nan)
            rank.group.all_reduce_add_norm(
                parts[rank.tp_rank], residual, weight, EPS, out, offset=1.0
            )
            assert torch.equal(residual, plain_residual), (num_rows, hidden)
            assert torch.equal(out, plain), (num_rows, hidden)
            rank.agree(residual, out)


def test_zeros_and_nan(rank: Rank) -> None:
    for size in (64, peer_layout.LIMITS[rank.tp_size].one_shot):
        for _ in range(4):
            x = torch.full((size,), -0.0, dtype=torch.bfloat16, device=rank.device)
            x[3] = x[-1] = torch.nan if rank.tp_rank == 1 else 2.0
            x[4] = torch.inf if rank.tp_rank == 0 else 1.0
            rank.group.all_reduce_(x)
            assert x.isnan().nonzero().flatten().tolist() == [3, size - 1]
            assert x[4] == torch.inf and not x[5:-1].any()
            rank.agree(x.nan_to_num(7.0))


def test_rows_and_tokens(rank: Rank) -> None:
    for seed, (num_rows, width) in enumerate(
        [(1, 64128), (64, 64128), (7, 501), (300, 16), (2, 3)]
    ):
        for dtype in (*DTYPES, torch.float32):
            parts = rank.payload(seed, num_rows, width, dtype=dtype)
            expected = torch.cat(parts, dim=1)
            out = torch.full_like(expected, torch.nan) if rank.tp_rank == 0 else None
            rank.group.gather_rows(parts[rank.tp_rank], out)
            assert out is None or torch.equal(out, expected), (num_rows, width)
            if out is not None:  # the leader's own part in its place
                wide = torch.stack(parts)
                wide[1:] = torch.nan
                rank.group.gather_parts(wide[0], wide)
                assert torch.equal(wide, torch.stack(parts))
            else:
                rank.group.gather_parts(parts[rank.tp_rank], None)
    for count in (1, 2, 256, 4096, 5000):
        expected = torch.arange(count, dtype=torch.int32, device=rank.device) - 7
        tokens = expected.clone() if rank.tp_rank == 0 else torch.zeros_like(expected)
        rank.group.broadcast_tokens(tokens)
        assert torch.equal(tokens, expected), count


def test_graph(rank: Rank) -> None:
    """All ops in one graph, replayed with ranks that are never in step: as one by one."""
    num_rounds = 1000 if torch.cuda.device_count() >= rank.tp_size else 40
    one, two = rank.payload(1, 4096), rank.payload(2, 600_000)
    partials, residuals = rank.payload(3, 4, 4096), rank.payload(4, 4, 4096)
    weight = residuals[1][0].clone()
    x, y = one[rank.tp_rank], two[rank.tp_rank]
    partial, residual, normed = partials[rank.tp_rank], residuals[0], torch.empty_like(partials[0])
    rows = torch.zeros(4, 4096 * rank.tp_size, dtype=torch.bfloat16, device=rank.device)
    tokens = torch.zeros(64, dtype=torch.int32, device=rank.device)

    def step() -> None:
        rank.group.all_reduce_(x)
        rank.group.all_reduce_add_norm(partial, residual, weight, EPS, normed)
        rank.group.all_reduce_(y)
        partial.copy_(normed / (1 + rank.tp_rank))
        rank.group.gather_rows(normed, rows if rank.tp_rank == 0 else None)
        if rank.tp_rank == 0:
            tokens.copy_(rows.view(torch.int16)[0, :64])
        rank.group.broadcast_tokens(tokens)
        x.copy_(normed[0] / (rank.tp_rank + 2))
        y.div_(rank.tp_size)

    state = (x, y, partial, residual, normed, tokens)
    first = [tensor.clone() for tensor in state]
    told = []  # what one by one gives
    for turn in range(num_rounds):
        step()
        if turn % 20 == 19:
            told.append([tensor.clone() for tensor in state])
    for tensor, value in zip(state, first, strict=True):
        tensor.copy_(value)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()
    rank.exchange(b"captured")
    delays = random.Random(rank.tp_rank)
    for turn in range(num_rounds):
        if delays.random() < 0.05:
            time.sleep(delays.random() / 50)  # launches late, the others wait on their cards
        if delays.random() < 0.1:
            torch.cuda._sleep(delays.randrange(400_000))
        graph.replay()
        if turn % 20 == 19:
            for tensor, value in zip(state, told[turn // 20], strict=True):
                assert torch.equal(tensor.nan_to_num(), value.nan_to_num()), turn
    rank.agree(residual, normed, y)


def test_lost_peer(rank: Rank) -> None:
    """All but the leader leave; its wait ends, as an error."""
    if rank.tp_rank != 0:
        time.sleep(4)  # its memory stays mapped meanwhile
        return
    x = torch.ones(4096, dtype=torch.bfloat16, device=rank.device)
    began = time.monotonic()
    rank.group.all_reduce_(x)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        assert 0.5 < time.monotonic() - began < 3.5, error
        os._exit(0)  # nothing more can be done with this context
    raise AssertionError("a sum without the other rank")


TESTS: dict[str, Callable[[Rank], None]] = {
    name: test for name, test in globals().items() if name.startswith("test_") and callable(test)
}


def main(name: str, tp_rank: int, tp_size: int, meeting: str) -> None:
    spin_s = 1.0 if name == "test_lost_peer" else 20.0
    rank = Rank(tp_rank, tp_size, Path(meeting), spin_s)
    TESTS[name](rank)
    torch.cuda.synchronize()
    if name != "test_lost_peer":
        rank.exchange(b"done")  # nobody writes to our buffer any more
        rank.group.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
