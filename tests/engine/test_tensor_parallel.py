"""What carries the leader's calls to the other ranks, and what tells of their end."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from bench.server_process import free_port
from pyserve.config import DEMO_MODEL, EngineConfig, launched
from pyserve.engine import devices
from pyserve.engine.batch import StepShape
from pyserve.engine.tensor_parallel import calls, followers, news, ring
from pyserve.engine.tensor_parallel import launched as launched_ranks
from pyserve.engine.tensor_parallel.follower import _read_pairs
from pyserve.engine.tensor_parallel.followers import Followers
from pyserve.engine.tensor_parallel.launched import LaunchedFollowers, LaunchedLine, agree
from pyserve.engine.tensor_parallel.ranks import Ranks
from pyserve.engine.tensor_parallel.ring import Ring
from pyserve.engine.tensor_parallel.spawned import is_stuck, spawn
from pyserve.errors import ConfigError, DeviceError, StartupError
from pyserve.flag_rows import LoraModule
from pyserve.model.adapter_weights import AdapterWeights, Pair
from pyserve.ops import meeting
from pyserve.ops.group import is_by_others
from pyserve.ops.meeting import Meeting
from tests.waiting import wait_until

SHAPE = StepShape(5, 3, 2, 4)
ALL_CALLS: list[calls.AnyCall] = [
    calls.Bring(b"\x00\x01"), calls.Forward(SHAPE, True), calls.Sample(SHAPE, [1, 2]),
    calls.Record(SHAPE), calls.Reset(), calls.AllocateKV(7), calls.FreeKV(), calls.DropModel(),
    calls.TakeModel(), calls.Measure(),
    calls.PutAdapter(1, "/x", "float32", [calls.StoredPair("q", 8, 64, 32, 0.5)]),
]  # fmt: skip


@pytest.mark.parametrize("call", ALL_CALLS, ids=lambda call: type(call).__name__)
def test_calls_arrive_as_they_were(call: calls.AnyCall) -> None:
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(call), type=calls.AnyCall)
    assert arrived == call and type(arrived) is type(call)
    if isinstance(call, calls.Forward):
        assert isinstance(arrived, calls.Forward) and isinstance(arrived.shape, StepShape)


def test_a_follower_gets_the_settings_that_the_leader_has() -> None:
    config = EngineConfig(
        model_path=Path("/m"), device="cpu", tensor_parallel_size=4, enable_lora=True,
        lora_modules=(LoraModule("a", "/b"),), max_model_len=77, trace=Path("/t"),
    )  # fmt: skip
    start = news.Start(config, 3, "info")
    assert news.decode_start(news.encode(start)) == start


def test_every_reader_gets_every_message_in_order() -> None:
    """Many times around the ring, of all lengths, readers of all speeds."""
    made = Ring.create(3, message_bytes=100, num_places=4)
    sent = [bytes([i % 251]) * (i * 37 % 101) for i in range(3000)]
    got: list[list[bytes]] = [[], [], []]

    def read(reader: int) -> None:
        place_bytes, num_places = made.sizes
        own = Ring(made.fds, place_bytes=place_bytes, num_places=num_places)
        for i in range(len(sent)):
            if i % 1000 == 100 * reader:
                time.sleep(0.01)
            got[reader].append(own.get(reader))

    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(3)]
    for thread in threads:
        thread.start()
    for message in sent:
        made.put(message)
    for thread in threads:
        thread.join(30)
    assert got == [sent] * 3
    made.close()


def test_a_reader_that_takes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "FULL_S", 0.05)
    made = Ring.create(2, message_bytes=8, num_places=2)
    for _ in range(2):
        made.put(b"x")
        made.get(0)
    with pytest.raises(TimeoutError, match="rank 2 has taken nothing"):
        made.put(b"x")
    made.close()


def test_a_follower_that_cannot_start_is_told_in_its_own_words(tmp_path: Path) -> None:
    """Its model is not there: the leader would have refused it before."""
    both = Followers(EngineConfig(model_path=tmp_path, device="cpu", tensor_parallel_size=2))
    try:
        with pytest.raises(StartupError, match=r"rank 1: .*config.json"):
            both.wait(news.Planned, 60)
        with pytest.raises(DeviceError, match="rank 1"):
            both.tell(calls.Reset())
        assert both.cause(RuntimeError("x")).startswith("rank 1")
    finally:
        both.close()


@pytest.mark.parametrize("ends_first", [True, False])
def test_of_several_the_one_that_ended_is_the_cause(tmp_path: Path, ends_first: bool) -> None:
    """A rank whose step fails because another was killed may be heard before that one's end."""
    lost: list[str] = []
    all_four = Followers(EngineConfig(model_path=tmp_path, device="cpu", tensor_parallel_size=4))
    try:
        all_four._is_closing = True  # nothing that they say on their own counts here
        all_four._listening.join()
        all_four._is_closing, all_four._lost = False, None
        all_four._on_lost = lost.append
        failed, _, killed = all_four._all
        if ends_first:
            killed.process.kill()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            theirs.send(news.encode(news.Failed("connection reset by peer")))
            failed.sock, kept = ours, failed.sock
            all_four._hear(failed, 0.0)
            failed.sock = kept
    finally:
        all_four.close()
    expected = "rank 3 was ended by SIGKILL" if ends_first else "rank 1: connection reset by peer"
    assert lost == [expected]


def test_a_leader_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    """While the others come: no file, and no process."""
    program = (
        "import os, signal, sys; from pathlib import Path; from pyserve.config import EngineConfig;"
        "from pyserve.engine.tensor_parallel.followers import Followers;"
        "both = Followers(EngineConfig(model_path=Path('/m'), device='cpu',"
        " tensor_parallel_size=2)); print(both._all[0].process.pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    follower = Path(f"/proc/{int(done.stdout)}/cmdline")
    wait_until(lambda: not follower.exists() or not follower.read_bytes(), timeout_s=60)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Followers]:
    """A follower that never says or does anything."""
    program = tmp_path / "sleeper"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(followers, "START_STUCK_S", 0.5)
    monkeypatch.setattr(followers, "END_S", 0.1)
    both = Followers(EngineConfig(model_path=tmp_path, device="cpu", tensor_parallel_size=2))
    yield both
    both.close()


def test_a_follower_that_hangs_during_the_start_is_named(sleeper: Followers) -> None:
    with pytest.raises(StartupError, match="rank 1 hangs: it does not run"):
        sleeper.wait(news.Planned, 30)


def test_nobody_waits_for_a_rank_that_ends_while_they_join(
    sleeper: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch does, for ten minutes: the process ends, as nothing else helps."""
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    is_ended = threading.Event()

    def end(code: int) -> None:
        codes.put(code)
        is_ended.set()

    def join(*args: object) -> None:
        sleeper._all[0].process.kill()
        assert is_ended.wait(30)
        raise DeviceError("here too")

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(followers, "join_group", join)
    with pytest.raises(StartupError, match="rank 1 was ended by SIGKILL"):
        sleeper.join(torch.device("cpu"))
    assert codes.get(timeout=1) == 1


def test_a_follower_that_does_not_come_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sleep")  # which does not know the arguments
    both = Followers(EngineConfig(model_path=tmp_path, device="cpu", tensor_parallel_size=2))
    try:
        with pytest.raises(StartupError, match="rank 1 exited with 1"):
            both.wait(news.Planned, 10)
    finally:
        both.close()


@pytest.mark.parametrize(
    ("cards", "refusal"),
    [
        ([], "needs as many cards, and this machine shows 0"),
        (["A"], "needs as many cards, and this machine shows 1"),
        (["A", "B"], "needs cards of one kind, and these are A, B"),
        (["A", "A"], None),
        (["A", "A", "B"], None),
    ],
)
def test_what_cards_can_share_a_model(
    monkeypatch: pytest.MonkeyPatch, cards: list[str], refusal: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index])
    devices.check_cards(torch.device("cuda"), 1)
    devices.check_cards(devices.CPU, 2)
    if refusal is None:
        devices.check_cards(torch.device("cuda"), 2)
        return
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size 2 {refusal}"):
        devices.check_cards(torch.device("cuda"), 2)


def test_all_adapters_of_a_step_are_there_for_a_rank_that_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step puts in as many as there are slots, and the others read them when they come to it."""
    told: list[calls.AnyCall] = []
    monkeypatch.setattr(Followers, "tell", lambda self, call: told.append(call))
    config = EngineConfig(model_path=Path("/m"), device="cpu", enable_lora=True, max_loras=24)
    alone = Followers(config)
    try:
        for slot in [*range(24), *range(24)]:  # the files of the step in front go
            number = float(len(told))
            pair = Pair(torch.full((2, 3), number), torch.full((4, 2), -number), number)
            alone.tell_adapter(slot, AdapterWeights({"q": pair}, ""))
        for index, call in enumerate(told[24:], 24):
            assert isinstance(call, calls.PutAdapter)
            found = _read_pairs(call)["q"]
            assert found.a.tolist() == [[index] * 3] * 2 and found.b.tolist() == [[-index] * 2] * 4
    finally:
        alone.close()
    assert not alone._kept


def test_processes_end_with_a_leader_that_never_begins() -> None:
    (process,) = spawn(2)
    process.sock.close()
    assert process.process.wait(60) == 0


def test_who_only_waits_for_a_core_is_not_stuck() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            wait_until(lambda: not is_stuck(busy.pid))
            os.kill(busy.pid, signal.SIGSTOP)
            wait_until(lambda: is_stuck(busy.pid))
        finally:
            busy.kill()
    assert is_stuck(busy.pid), "nothing of it is left"


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
