"""Ranks that torchrun has started: how they meet, agree, and notice each other's end."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.server_process import free_port
from pyserve.config import DEMO_MODEL, EngineConfig, launched
from pyserve.engine import devices
from pyserve.engine.tensor_parallel import launched as launched_ranks
from pyserve.engine.tensor_parallel import news
from pyserve.engine.tensor_parallel.launched import (
    LINE_SILENT_S,
    UNHEARD_MS,
    LaunchedFollowers,
    LaunchedLine,
    _kept_alive,
    agree,
)
from pyserve.engine.tensor_parallel.ranks import Ranks
from pyserve.errors import ConfigError, DeviceError, StartupError
from pyserve.ops import meeting
from pyserve.ops.group import is_by_others
from pyserve.ops.meeting import Meeting


def test_what_torchrun_says_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == (3, 4, 1)
    devices.check_cards(devices.CPU, 4)
    with pytest.raises(ConfigError, match="size 2, but torchrun has started 4 processes"):
        devices.check_cards(devices.CPU, 2)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ConfigError, match="must be numbers"):
        launched()


def meet(act: Callable[[Meeting], object], tp_rank: int, store: Any) -> object:
    """What `act` returns, or the text of what it raises."""
    here = Meeting(store, tp_rank, 2)
    try:
        return act(here)
    except StartupError as error:
        return str(error)
    finally:
        here.end()


def both(first: Callable[[Meeting], object], second: Callable[[Meeting], object]) -> list[object]:
    """What two ranks come to."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(meet, (first, second), range(2), (store, store)))


def test_ranks_of_torchrun_agree_before_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(model_path=DEMO_MODEL)
    as_the_leader = partial(agree, config)
    elsewhere = partial(agree, replace(config, model_path=Path("/mnt/model")))
    assert both(as_the_leader, elsewhere) == [None, None], "each has its own folder"
    otherwise = partial(agree, replace(config, dtype="float16", max_model_len=64))
    named = "--dtype float16 (rank 0: auto), --max-model-len 64 (rank 0: not given)"
    for said in both(as_the_leader, otherwise):
        assert f"rank 1 has {named}: " in str(said)


def test_what_the_leader_alone_reads_may_differ() -> None:
    """As the settings of HTTP may, which are not asked for at all."""
    config = EngineConfig(model_path=DEMO_MODEL)
    others: Any = {
        "logprobs_mode": "raw_logits", "target_itl_ms": 1, "enable_prefix_caching": False,
        "scheduling_policy": "priority", "trace": Path("/t"), "max_queue": 1, "idle_sleep_min": 1.0,
    }  # fmt: skip
    assert others.keys() == launched_ranks.LEADERS_OWN
    assert both(partial(agree, config), partial(agree, replace(config, **others))) == [None, None]


@pytest.fixture
def agents_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store of torchrun's agent, and the variables that it gives to the one rank here."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    for name, value in {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield store


def test_two_processes_of_one_rank_are_told(
    agents_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not one that torchrun has started again, which hears nothing of the time before."""
    first = Meeting.launched()
    assert first.wait_all("settings", "old") == [b"old"]
    with pytest.raises(StartupError, match="another process is rank 0 too: .*--node-rank"):
        Meeting.launched()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Meeting.launched()
    assert again.wait_all("settings", "new") == [b"new"]
    for here in (first, again):
        here.end()


@pytest.mark.parametrize("is_agents", [True, False])
def test_a_meeting_that_has_gone_is_named(
    is_agents: bool, agents_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torchrun's agent has listened before, nobody waits for it."""
    port = free_port()
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(is_agents))
    if not is_agents:
        monkeypatch.setattr(meeting, "SILENT_S", 0.3)
    began_s = time.monotonic()
    with pytest.raises(StartupError, match=f"127.0.0.1 port {port}, where rank 0 was started"):
        Meeting.launched()
    assert time.monotonic() - began_s < 5


def test_a_rank_is_waited_for_while_it_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch alone would wait for ten minutes for one that has gone, and no longer for one that
    downloads."""
    monkeypatch.setattr(meeting, "SILENT_S", 1.0)
    monkeypatch.setattr(meeting, "BEAT_S", 0.05)

    def arrive(here: Meeting) -> object:
        return here.wait_all("groups", str(here.tp_rank))

    def arrive_late(here: Meeting) -> object:
        time.sleep(2.5)
        return arrive(here)

    assert both(arrive, arrive_late) == [[b"0", b"1"]] * 2
    said, _ = both(arrive, lambda here: None)
    assert "nothing was heard of rank 1 for 1 s" in str(said)


def test_nobody_waits_in_torch_for_a_rank_that_is_not_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until the meeting's end, from which on it says nothing."""
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(os, "_exit", codes.put)
    monkeypatch.setattr(meeting, "SILENT_S", 0.5)
    monkeypatch.setattr(meeting, "BEAT_S", 0.05)
    store = dist.HashStore()  # type: ignore[attr-defined]
    here, other = (Meeting(store, tp_rank, 2) for tp_rank in range(2))
    here.watch()
    other.watch()
    time.sleep(1.0)
    assert codes.empty(), "both are heard of"
    other.end()
    assert codes.get(timeout=10) == 1
    here.end()
    assert codes.empty()


def test_a_line_tells_of_the_end_and_of_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched_ranks, "LINE_BEAT_S", 0.02)
    monkeypatch.setattr(launched_ranks, "LINE_SILENT_S", 0.5)

    def end_of(act: Callable[[LaunchedLine], object]) -> tuple[str, float]:
        """What the leader sees, and after how long, where rank 1 acts and rank 2 lives."""
        leader = object.__new__(LaunchedFollowers)
        pairs = [socket.socketpair() for _ in range(2)]
        leader.tp_size, leader._lines = 3, [ours for ours, _ in pairs]
        began_s = time.monotonic()
        with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
            for _, theirs in pairs:
                line = object.__new__(LaunchedLine)
                line._line = theirs
                stack.callback(theirs.close)
                pool.submit(act if theirs is pairs[0][1] else LaunchedLine._beat, line)
            lost = leader._first_lost()
            took_s = time.monotonic() - began_s
            for ours in leader._lines:
                ours.close()
        return lost, took_s

    assert end_of(lambda line: line._line.close())[0] == "rank 1 has gone"
    lost, took_s = end_of(lambda line: None)
    assert lost == "rank 1 hangs: silent for 0.5 s" and took_s >= 0.5


def test_a_line_ends_where_the_other_machine_acknowledges_nothing() -> None:
    """Keepalive alone would not notice: while a heartbeat is unacknowledged no probe is sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = _kept_alive(socket.create_connection(server.getsockname()))
    with line:
        assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNHEARD_MS
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert UNHEARD_MS / 1e3 < LINE_SILENT_S


def test_the_end_of_another_rank_is_not_this_one_s_fault() -> None:
    gloo = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed")
    assert is_by_others(gloo) and is_by_others(dist.DistNetworkError("recv"))
    assert not is_by_others(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not is_by_others(DeviceError("out of memory"))


class Strangers:
    """Followers that have planned with another model."""

    def wait(self, kind: type[news.Planned], timeout_s: float) -> list[news.Planned]:
        return [kind(9, 64, "cpu", "another")]


def test_ranks_with_another_model_are_refused() -> None:
    ranks = Ranks(EngineConfig(model_path=DEMO_MODEL), torch.device("cpu"))
    strangers: Any = Strangers()
    ranks.followers = strangers
    plan: Any = None
    with pytest.raises(StartupError, match=r"the model of rank 1 is not that of rank 0 in /.*"):
        ranks.join(plan)


WAITS_FOR_A_CALL = """
import sys, time
from datetime import timedelta
import torch
from torch.distributed import distributed_c10d
from pyserve.engine.tensor_parallel.launched import _Words
distributed_c10d.default_pg_timeout = timedelta(seconds=1)
words = _Words(torch.device("cpu"))
if words.tp_rank == 0:
    time.sleep(2.5)
print(words._spread(b"a call" if words.tp_rank == 0 else b"").decode(), flush=True)
"""


def test_a_server_of_torchrun_may_have_nothing_to_do_for_long() -> None:
    """Longer than torch waits for what a group has to say."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WAITS_FOR_A_CALL], stdout=subprocess.PIPE, text=True,
            env=os.environ | where | {"RANK": str(tp_rank)},
        )
        for tp_rank in range(2)
    ]  # fmt: skip
    try:
        assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["a call\n"] * 2
    finally:
        for rank in ranks:
            rank.kill()
