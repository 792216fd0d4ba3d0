"""PeerGroup without a card: what lies where, which way a message goes, how ranks come together.

Ranks are threads here; the native ops are put on by their twins. The kernels are in
test_peers_emulated.py and tests/gpu/test_peers.py.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from pyserve.ops import peer_layout, peers, reference, reference_comm
from pyserve.ops.peer_layout import PEER_TP_RANK, PEER_TP_SIZE, PeerLimits
from pyserve.ops.peer_memory import PeerError
from pyserve.ops.peers import PeerGroup, exchange_over

HEADER = Path(__file__).resolve().parents[2] / "cuda" / "common" / "peers.h"
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for tp_size in peer_layout.LIMITS:
        monkeypatch.setitem(peer_layout.LIMITS, tp_size, PeerLimits(16 << 10, 64 << 10, 64 << 10))


class Memory:
    """Implements PeerMemory with numbers; `fault` is the method that fails here."""

    def __init__(self, tp_rank: int, fault: str | None = None) -> None:
        self._tp_rank, self._fault = tp_rank, fault
        self.allocated: dict[int, Tensor] = {}
        self.opened: list[int] = []
        self.others: list[Memory] = []  # whose mappings must be gone when this one frees

    def _try(self, method: str) -> None:
        if method == self._fault:
            raise PeerError(f"no {method}")

    def card_id(self) -> str:
        return f"card {self._tp_rank}"

    def allocate(self, num_bytes: int) -> int:
        self._try("allocate")
        address = (self._tp_rank + 1) << 32
        self.allocated[address] = torch.full((num_bytes // 4,), 7, dtype=torch.int32)
        return address

    def export(self, address: int) -> bytes:
        self._try("export")
        return address.to_bytes(64, "little")

    def check_access(self, card_id: str) -> None:
        self._try("check_access")
        assert card_id != self.card_id()

    def open(self, handle: bytes) -> int:
        self._try("open")
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def close(self, address: int) -> None:
        self.opened.remove(address)

    def free(self, address: int) -> None:
        assert not any(address in other.opened for other in self.others)
        del self.allocated[address]

    def words(self, address: int, num_words: int) -> Tensor:
        return self.allocated[address][:num_words]


class Ops:
    """The native ops, by their twins, for ranks that are threads. `fault`: a rank's wrong sum."""

    def __init__(self, tp_size: int, fault: int | None = None) -> None:
        self._barrier = threading.Barrier(tp_size)
        self._tensors: list[Any] = [None] * tp_size
        self._fault = fault
        self.calls: set[str] = set()

    def _meet(self, name: str, table: Tensor, own: Any, do: Callable[[list[Any]], None]) -> None:
        """do(all ranks' tensors) on the leader, while the others wait."""
        tp_rank = int(table[PEER_TP_RANK])
        assert table[PEER_TP_SIZE] == len(self._tensors)
        self.calls.add(name)
        self._tensors[tp_rank] = own
        self._barrier.wait(20)
        if tp_rank == 0:
            do(self._tensors)
        self._barrier.wait(20)

    def all_reduce_one_shot(self, x: Tensor, table: Tensor) -> None:
        assert x.numel() * 2 <= table[peer_layout.PEER_ONE_SHOT_BYTES]
        self._meet("one shot", table, x, reference_comm.all_reduce)
        if self._fault == table[PEER_TP_RANK]:
            x[-1] += 1

    def all_reduce_two_shot(self, x: Tensor, table: Tensor) -> None:
        assert x.numel() * 2 <= table[peer_layout.PEER_PIECE_BYTES] * len(self._tensors)
        self._meet("two shots", table, x, reference_comm.all_reduce)

    def all_reduce_add_norm(
        self, partial: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float,
        out: Tensor, table: Tensor,
    ) -> None:  # fmt: skip
        def do(all_own: list[Any]) -> None:
            partials, residuals, outs = zip(*all_own, strict=True)
            reference_comm.all_reduce_add_norm(partials, residuals, weight, eps, offset, outs)

        self._meet("norm", table, (partial, residual, out), do)

    def gather_rows(self, local: Tensor, out: Tensor | None, table: Tensor) -> None:
        assert local.numel() * 2 <= table[peer_layout.PEER_GATHER_BYTES]

        def do(all_own: list[Any]) -> None:
            parts, (leaders, *others) = zip(*all_own, strict=True)
            assert others == [None] * len(others)
            leaders.copy_(torch.stack(parts))

        self._meet("gather", table, (local, out), do)

    def broadcast_tokens(self, tokens: Tensor, table: Tensor) -> None:
        assert len(tokens) <= peer_layout.MAX_PEER_TOKENS
        self._meet("tokens", table, tokens, reference_comm.broadcast_tokens)


def run_ranks(
    tp_size: int, do: Callable[[PeerGroup], Any], memories: list[Memory] | None = None
) -> list[Any]:
    """do(group) of each rank, a thread each; whatever it did, the group is closed."""
    store = HashStore()
    memories = memories or [Memory(tp_rank) for tp_rank in range(tp_size)]

    def run(tp_rank: int) -> Any:
        group = PeerGroup(
            tp_rank, tp_size, CPU, exchange_over(store, tp_rank, tp_size),
            memory=memories[tp_rank],
        )  # fmt: skip
        try:
            return do(group)
        finally:
            group.close()

    with ThreadPoolExecutor(tp_size) as pool:
        results = list(pool.map(run, range(tp_size), timeout=60))
    assert not any(memory.allocated or memory.opened for memory in memories)
    return results


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_ranks_come_together(tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Ops(tp_size)
    monkeypatch.setattr(peers, "_ops", fake)

    def do(group: PeerGroup) -> tuple[str | None, int]:
        fake.calls.clear()
        rows = torch.full((2, 3), float(group.tp_rank), dtype=torch.bfloat16)
        out = torch.zeros(2, 3 * tp_size, dtype=torch.bfloat16) if group.tp_rank == 0 else None
        group.gather_rows(rows, out)
        expected = torch.arange(tp_size).repeat_interleave(3).expand(2, -1)
        assert out is None or torch.equal(out.long(), expected)
        return group.reason, group.num_bytes

    num_bytes = peer_layout.layout(tp_size).num_bytes
    assert run_ranks(tp_size, do) == [(None, num_bytes)] * tp_size


@pytest.mark.usefixtures("small")
def test_a_message_goes_the_way_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Ops(2)
    monkeypatch.setattr(peers, "_ops", fake)

    def way(do: Callable[..., None], *arguments: Any) -> set[str]:
        fake._barrier.wait(20)
        fake.calls.clear()
        fake._barrier.wait(20)
        do(*arguments)
        return set(fake.calls)

    def do(group: PeerGroup) -> None:
        for count, expected in ((8 << 10, "one shot"), ((8 << 10) + 8, "two shots")):
            x = torch.ones(count, dtype=torch.bfloat16)
            assert group.takes(x) and way(group.all_reduce_, x) == {expected}
            assert bool((x == 2).all())
        for rows, hidden, expected in (
            (2, 4096, "norm"), (3, 4096, "two shots"), (2, 100, "one shot"), (8, 1024, "norm")
        ):  # fmt: skip
            own = torch.arange(rows * hidden).view(rows, hidden) % 97 - 48
            partial, residual = own.bfloat16(), (own % 31).bfloat16()
            weight, out = torch.ones(hidden).bfloat16(), torch.empty(rows, hidden).bfloat16()
            plain_residual, plain = residual.clone(), torch.empty_like(out)
            reference.add_rms_norm(2 * partial, plain_residual, weight, 1e-5, plain, 0.5)
            arguments = (partial, residual, weight, 1e-5, out, 0.5)
            assert way(group.all_reduce_add_norm, *arguments) == {expected}
            assert torch.equal(residual, plain_residual)
            torch.testing.assert_close(out, plain)
        for x in (
            torch.ones((32 << 10) + 8).bfloat16(), torch.ones(8), torch.ones(7).bfloat16(),
            torch.ones(4, 16).bfloat16()[:, :8], torch.ones(9).bfloat16()[1:],
        ):  # fmt: skip
            assert not group.takes(x)

    run_ranks(2, do)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fault", ["allocate", "export", "check_access", "open", "sum"])
def test_all_ranks_hear_why_one_cannot(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_ops", Ops(2, fault=1 if fault == "sum" else None))
    memories = [Memory(0), Memory(1, fault)]
    memories[0].others, memories[1].others = memories[1:], memories[:1]
    reasons = run_ranks(2, lambda group: (group.reason, group.num_bytes), memories)
    said = {"sum": "the sum of 16 bytes: not what the ranks' cards had"}.get(fault, f"no {fault}")
    assert reasons == [(f"rank 1: {said}", 0)] * 2


def test_other_numbers_of_ranks_are_refused() -> None:
    group = PeerGroup(0, 3, CPU, lambda own: pytest.fail("nothing to tell"))
    assert group.reason == "3 ranks, not 2, 4 or 8"
    group.close()


def test_the_buffer_is_cleared_before_others_write() -> None:
    memory = Memory(0)

    def exchange(own: bytes) -> list[bytes]:
        (words,) = memory.allocated.values()
        places = peer_layout.layout(2)
        begin, end = places.one_shot // 4, places.one_shot_end // 4
        assert bool((words[begin:end].view(torch.int16) == -0x8000).all())
        assert not words[:begin].any() and not words[end:].any()
        raise ConnectionError("enough")

    with pytest.raises(ConnectionError, match="enough"):
        PeerGroup(0, 2, CPU, exchange, memory=memory)


@pytest.mark.parametrize("tp_size", peer_layout.LIMITS)
def test_areas_hold_what_goes_there(tp_size: int) -> None:
    places, limits = peer_layout.layout(tp_size), peer_layout.LIMITS[tp_size]
    others = tp_size - 1
    sizes = {
        0: 4 * peer_layout.CONTROL_WORDS,
        places.one_shot: peer_layout.ONE_SHOT_ROUNDS * others * limits.one_shot,
        places.reduce: others * places.piece_bytes,
        places.spread: others * places.piece_bytes,
        places.gather: others * limits.gather,
        places.tokens: 2 * 8 * peer_layout.MAX_PEER_TOKENS,
    }
    ends = [*list(sizes)[1:], places.num_bytes]
    for (begin, size), end in zip(sizes.items(), ends, strict=True):
        assert begin % 16 == 0 and begin + size <= end
    assert places.piece_bytes * tp_size == limits.two_shot and places.piece_bytes % 16 == 0
    assert places.num_bytes % (2 << 20) == 0 and places.num_bytes <= 64 << 20
    assert limits.one_shot % 16 == 0 and limits.one_shot < limits.two_shot


def test_python_and_cpp_agree() -> None:
    """Every constant of peers.h, by a reading of its enums and constexprs."""
    text = re.sub(r"//.*", "", HEADER.read_text())
    values: dict[str, int] = {}
    for name, value in re.findall(r"constexpr int\d+_t (k\w+) = (\w+);", text):
        values[name] = int(value, 0)
    for body in re.findall(r"enum \w+ : int32_t \{(.*?)\}", text, re.DOTALL):
        last = -1
        for entry in filter(None, (part.strip() for part in body.split(","))):
            name, _, value = entry.partition(" = ")
            last = sum_of(value, values) if value else last + 1
            values[name] = last
    python = {
        name: value
        for name, value in vars(peer_layout).items()
        if name.startswith(("PEER_", "CONTROL_", "MAX_", "ONE_")) and isinstance(value, int)
    }
    assert {re.sub(r"(?<=.)(?=[A-Z])", "_", name[1:]).upper(): v for name, v in values.items()} == {
        **python
    }


def sum_of(expression: str, values: dict[str, int]) -> int:
    """a + b * c of names and numbers."""
    total = 0
    for term in expression.split(" + "):
        product = 1
        for factor in term.split(" * "):
            product *= values[factor] if factor in values else int(factor, 0)
        total += product
    return total


def test_the_sum_is_that_of_float32_in_order() -> None:
    parts = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, -256.0)]
    assert reference_comm.sum_parts(parts).item() == 2.0
    negative = [torch.tensor([-0.0], dtype=torch.bfloat16)] * 2
    assert str(reference_comm.sum_parts(negative).item()) == "0.0"
