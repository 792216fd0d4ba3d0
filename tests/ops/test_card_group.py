"""Which way a CardGroup sends what; the ways themselves are tested elsewhere, and on cards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyserve.ops import card_group
from pyserve.ops.card_group import CardGroup, join_group
from pyserve.ops.group import LEADER

CARD = torch.device("cuda", 0)


class Noted:
    """Notes the names of its methods that are called, under the name of the class."""

    calls: list[str] = []
    reason: str | None = None
    store = "the store"

    def __init__(self, *arguments: object) -> None:
        Noted.calls.append(type(self).__name__)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: Noted.calls.append(f"{type(self).__name__}.{name}")


class Process(Noted):
    pass


class Peers(Noted):
    def takes(self, x: torch.Tensor) -> bool:
        return x.dtype == torch.bfloat16 and len(x) < 100


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(card_group, "ProcessGroup", Process)
    monkeypatch.setattr(card_group, "PeerGroup", Peers)
    monkeypatch.setattr(Noted, "calls", [])
    return Noted.calls


def use(group: CardGroup, num_rows: int) -> None:
    x = torch.zeros(num_rows, 8, dtype=torch.bfloat16)
    group.all_reduce(x)
    group.add_rms_norm(x, x, x[0], 1e-5, x, 0.0)
    group.gather(x[None])
    group.broadcast(torch.zeros(3, dtype=torch.int32))
    group.close()


def test_small_messages_go_through_the_cards_memory(calls: list[str]) -> None:
    use(CardGroup("/meeting", 1, 2, CARD), 64)
    assert calls == [
        "Process", "Peers", "Peers.all_reduce_", "Peers.all_reduce_add_norm", "Peers.gather_parts",
        "Peers.broadcast_tokens", "Peers.close", "Process.close",
    ]  # fmt: skip


def test_large_ones_go_by_nccl(calls: list[str]) -> None:
    use(CardGroup("/meeting", LEADER, 2, CARD), 100)
    assert calls[2:4] == ["Process.all_reduce", "Process.add_rms_norm"]


def test_cards_that_do_not_reach_each_other(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peers, "reason", "rank 1: no access")
    group = CardGroup("/meeting", LEADER, 2, CARD)
    assert group.reason == "rank 1: no access"
    use(group, 1)
    assert calls[2:6] == [
        "Process.all_reduce", "Process.add_rms_norm", "Process.gather", "Process.broadcast"
    ]  # fmt: skip


def test_each_kind_of_device_has_its_group(calls: list[str]) -> None:
    assert isinstance(join_group("/meeting", 0, 2, CARD), CardGroup)
    assert isinstance(join_group("/meeting", 0, 2, torch.device("cpu")), Process)
