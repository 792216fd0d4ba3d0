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
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from pyserve.config import EngineConfig
from pyserve.engine import devices
from pyserve.engine.batch import StepShape
from pyserve.engine.tensor_parallel import calls, followers, news, ring
from pyserve.engine.tensor_parallel.follower import _read_pairs
from pyserve.engine.tensor_parallel.followers import Followers
from pyserve.engine.tensor_parallel.ring import Ring
from pyserve.engine.tensor_parallel.spawned import is_stuck, spawn
from pyserve.errors import ConfigError, DeviceError, StartupError
from pyserve.flag_rows import LoraModule
from pyserve.model.adapter_weights import AdapterWeights, Pair
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
