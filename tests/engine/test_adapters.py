"""HostAdapters: names, versions, who holds them, and room for so many."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pyserve.client import Adapter
from pyserve.engine.adapters import HostAdapters
from pyserve.errors import (
    CheckpointError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
)
from tests.waiting import until


class Files:
    """What would be read: folder -> what it holds. Counts the reads."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.contents: dict[str, object] = {}

    def __call__(self, folder: Path) -> Any:
        self.num_reads += 1
        if folder.name == "bad" or self.contents.get(folder.name) == "bad":
            raise CheckpointError(f"{folder} is bad")
        return self.contents.get(folder.name, folder.name)


def make(limit: int = 2, folder: Path | None = None, max_waiting: int = 10) -> HostAdapters:
    return HostAdapters(Files(), limit=limit, folder=folder, max_waiting=max_waiting)


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 30))

    run.__name__ = test.__name__
    return run


@on_loop
async def test_load_acquire_unload() -> None:
    adapters = make()
    await adapters.load("sql", "/a/sql")
    assert adapters.has("sql") and not adapters.has("code")
    assert [(it.name, it.root) for it in adapters.served] == [("sql", "/a/sql")]
    first = await adapters.acquire("sql")
    again = await adapters.acquire("sql")
    assert first is again and first.weights == "sql" and adapters.num_loads == 1
    adapters.unload("sql")
    assert not adapters.has("sql") and adapters.num_kept == 1, "it is held"
    with pytest.raises(NotFoundError):
        await adapters.acquire("sql")
    with pytest.raises(NotFoundError, match="`sql` is not loaded"):
        adapters.unload("sql")
    adapters.release(first)
    adapters.check_invariants()
    adapters.release(again)
    adapters.check_invariants()
    assert adapters.num_kept == 0


@on_loop
async def test_another_load_of_a_name_is_another_version() -> None:
    adapters = make()
    await adapters.load("sql", "/a/one")
    old = await adapters.acquire("sql")
    with pytest.raises(InvalidRequestError, match="has already been loaded"):
        await adapters.load("sql", "/a/two")
    assert (await adapters.acquire("sql")) is old
    adapters.release(old)
    await adapters.load("sql", "/a/two", is_reload=True)
    new = await adapters.acquire("sql")
    assert new.version != old.version and (old.weights, new.weights) == ("one", "two")
    assert adapters.num_kept == 2
    adapters.check_invariants()
    adapters.release(old)
    assert adapters.num_kept == 1
    adapters.release(new)
    adapters.check_invariants()


@on_loop
async def test_a_load_that_fails_changes_nothing() -> None:
    adapters = make(limit=1)
    await adapters.load("sql", "/a/sql")
    before = await adapters.acquire("sql")
    adapters.release(before)
    for name in ("sql", "other"):
        with pytest.raises(CheckpointError):
            await adapters.load(name, "/a/bad", is_reload=True)
    assert [it.name for it in adapters.served] == ["sql"]
    after = await adapters.acquire("sql")
    # The failed load of another name has taken its room; it was read again.
    assert after.weights == before.weights
    adapters.check_invariants()
    for name in ("", "a\nb", "x" * 257):
        with pytest.raises(InvalidRequestError, match="lora_name"):
            await adapters.load(name, "/a/sql")


@on_loop
async def test_the_one_that_was_used_longest_ago_is_read_again() -> None:
    adapters = make(limit=2)
    for name in ("a", "b", "c"):
        await adapters.load(name, f"/x/{name}")
    assert adapters.num_kept == 2 and len(adapters.served) == 3
    b = await adapters.acquire("b")
    adapters.release(b)
    a = await adapters.acquire("a")  # c gives way: b was used since
    assert (await adapters.acquire("b")) is b
    adapters.check_invariants()
    assert a.version > b.version
    assert adapters.num_loads == 4


@on_loop
async def test_who_waits_for_room_is_not_passed() -> None:
    adapters = make(limit=1)
    await adapters.load("a", "/x/a")
    await adapters.load("b", "/x/b")
    held = await adapters.acquire("b")
    order: list[str] = []

    async def ask(name: str) -> Adapter:
        adapter = await adapters.acquire(name)
        order.append(name)
        return adapter

    first = asyncio.create_task(ask("a"))
    await until(lambda: adapters._is_short)
    second = asyncio.create_task(ask("b"))  # it is there, but somebody waits already
    await asyncio.sleep(0.01)
    assert not order
    adapters.release(held)
    adapter = await first
    assert order == ["a"]
    adapters.release(adapter)
    await second
    assert order == ["a", "b"]
    adapters.check_invariants()


@on_loop
async def test_who_leaves_while_waiting_leaves_nothing() -> None:
    adapters = make(limit=1, max_waiting=1)
    await adapters.load("a", "/x/a")
    await adapters.load("b", "/x/b")
    held = await adapters.acquire("b")
    task = asyncio.create_task(adapters.acquire("a"))
    await until(lambda: adapters._is_short)
    with pytest.raises(QueueFullError, match="1 request"):
        await adapters.acquire("a")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not adapters._is_short and (await adapters.acquire("b")) is held
    adapters.check_invariants()


@on_loop
async def test_an_adapter_that_cannot_be_read_again() -> None:
    adapters = make(limit=1)
    await adapters.load("a", "/x/a")
    await adapters.load("b", "/x/b")
    adapters._read_folder.contents["a"] = "bad"  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="`a` cannot be loaded any more$"):
        await adapters.acquire("a")
    assert (await adapters.acquire("b")).weights == "b"
    adapters.check_invariants()


@on_loop
async def test_a_folder_does_not_wait_for_a_download() -> None:
    may_end = threading.Event()

    def find(root: str) -> Path:
        if root == "org/slow":
            assert may_end.wait(20)
        return Path(root)

    adapters = HostAdapters(Files(), limit=2, find=find)
    slow = asyncio.create_task(adapters.load("slow", "org/slow"))
    await until(adapters._finding.locked)
    await adapters.load("here", "/")
    assert not slow.done() and [it.name for it in adapters.served] == ["here"]
    may_end.set()
    await slow
    assert adapters.num_kept == 2


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    for name in ("sql", "no-adapter", ".hidden"):
        (tmp_path / "all" / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    for path in ("all/sql", "all/.hidden", "outside"):
        (tmp_path / path / "adapter_config.json").write_text("{}")

    async def run() -> None:
        adapters = make(folder=tmp_path / "all")
        for name in ("../outside", "..", ".hidden", "no-adapter", "", "sql/", "sql/../sql", "x\0"):
            assert not adapters.has(name)
            with pytest.raises(NotFoundError):
                await adapters.acquire(name)
        assert adapters.has("sql") and not adapters.served
        adapter = await adapters.acquire("sql")
        assert adapter.weights == "sql" and [it.name for it in adapters.served] == ["sql"]
        adapters.check_invariants()

    asyncio.run(run())


@pytest.mark.parametrize("limit", [1, 3])
def test_random_operations(limit: int) -> None:
    """Every request gets what was served under its name when it was asked for, whole."""

    async def run() -> None:
        rng = random.Random(limit)
        adapters = make(limit, max_waiting=1000)
        generation = 0

        async def use(name: str) -> None:
            try:
                adapter = await adapters.acquire(name)
            except NotFoundError:
                return
            seen = adapter.weights
            try:
                await asyncio.sleep(rng.random() * 0.002)
                assert adapter.name == name and adapter.weights is seen and seen[0] == name
                adapters.check_invariants()
            finally:
                adapters.release(adapter)
                adapters.check_invariants()

        async def change(name: str) -> None:
            nonlocal generation
            generation += 1
            adapters._read_folder.contents[name] = (name, generation)  # type: ignore[attr-defined]
            if rng.random() < 0.3 and any(it.name == name for it in adapters.served):
                adapters.unload(name)
            else:
                await adapters.load(name, f"/x/{name}", is_reload=True)
            adapters.check_invariants()

        tasks = []
        for _ in range(400):
            name = rng.choice("abcde")
            act = use if rng.random() < 0.8 else change
            tasks.append(asyncio.create_task(act(name)))
            if rng.random() < 0.3:
                await asyncio.sleep(0)
            if rng.random() < 0.05:
                rng.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [it for it in results if isinstance(it, Exception)]
        assert not errors, errors
        adapters.check_invariants()

    asyncio.run(asyncio.wait_for(run(), 60))
