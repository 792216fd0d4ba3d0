"""Text work on threads: who waits for whom, what is refused, what is left in memory."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pyserve.api import text_queue
from pyserve.api.text_queue import MAX_SHORT_BYTES, NUM_THREADS, TextQueue
from pyserve.errors import QueueFullError
from tests.waiting import until

LONG = MAX_SHORT_BYTES + 1


class Held:
    """Work that goes on until it is told to end, and notes when it began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gate = threading.Semaphore(0)

    def work(self, name: str) -> Callable[[], str]:
        def function() -> str:
            self.begun.append(name)
            assert self.gate.acquire(timeout=10)
            return name

        return function


def run(
    test: Callable[[TextQueue, Held], Coroutine[Any, Any, None]], *, num_cores: int = 8
) -> None:
    async def whole() -> None:
        queue, held = TextQueue(num_cores), Held()
        try:
            await asyncio.wait_for(test(queue, held), 20)
        finally:
            for _ in range(100):
                held.gate.release()
            queue.close()

    asyncio.run(whole())


def test_long_work_leaves_room_for_short_work() -> None:
    """24 connections with a megabyte each made everybody's chats wait for all of it."""

    async def test(queue: TextQueue, held: Held) -> None:
        tasks = [
            asyncio.ensure_future(
                queue.run(held.work(f"long {i}"), client=f"c{i}", num_bytes=2**20)
            )
            for i in range(24)
        ]
        await until(lambda: len(held.begun) == 2)
        assert await queue.run(lambda: "at once", client="c0", num_bytes=10) == "at once"
        assert len(held.begun) == 2, "the third thread was free"
        for _ in tasks:
            held.gate.release()
        assert await asyncio.gather(*tasks) == [f"long {i}" for i in range(24)]

    run(test)


@pytest.mark.parametrize(("num_cores", "num_long"), [(1, 1), (2, 1), (3, 2), (64, 2)])
def test_long_work_leaves_a_core_to_the_steps(num_cores: int, num_long: int) -> None:
    async def test(queue: TextQueue, held: Held) -> None:
        tasks = [
            asyncio.ensure_future(queue.run(held.work("long"), client=f"c{i}", num_bytes=LONG))
            for i in range(3)
        ]
        assert await queue.run(lambda: "at once", client="c0", num_bytes=10) == "at once"
        await until(lambda: len(held.begun) == num_long)
        tasks += [
            asyncio.ensure_future(queue.run(held.work("short"), client="c0", num_bytes=10))
            for _ in range(3)
        ]
        await until(lambda: len(held.begun) == min(num_long + 2, NUM_THREADS))
        await asyncio.sleep(0.05)
        assert held.begun.count("long") == num_long
        assert held.begun.count("short") == min(2, NUM_THREADS - num_long)
        for _ in tasks:
            held.gate.release()
        await asyncio.gather(*tasks)

    run(test, num_cores=num_cores)


def test_short_work_does_not_starve_long_work() -> None:
    async def test(queue: TextQueue, held: Held) -> None:
        tasks = [
            asyncio.ensure_future(queue.run(held.work(f"short {i}"), client="a", num_bytes=9))
            for i in range(20)
        ]
        tasks.append(
            asyncio.ensure_future(queue.run(held.work("long"), client="a", num_bytes=LONG))
        )
        await until(lambda: len(held.begun) == NUM_THREADS)
        assert "long" in held.begun
        for _ in tasks:
            held.gate.release()
        await asyncio.gather(*tasks)

    run(test)


@pytest.mark.parametrize("num_bytes", [10, LONG])
def test_clients_take_turns(num_bytes: int) -> None:
    async def test(queue: TextQueue, held: Held) -> None:
        tasks = [
            asyncio.ensure_future(queue.run(held.work(name), client=name[0], num_bytes=num_bytes))
            for name in ("a1", "a2", "a3", "a4", "a5", "b1", "c1", "c2")
        ]
        for count in range(3, len(tasks) + 1):
            await until(lambda count=count: len(held.begun) == count - 1)  # type: ignore[misc]
            held.gate.release()
        await until(lambda: len(held.begun) == len(tasks))
        held.gate.release()
        held.gate.release()
        await asyncio.gather(*tasks)
        assert held.begun == ["a1", "a2", "a3", "b1", "c1", "a4", "c2", "a5"]

    run(test)


@pytest.mark.parametrize("what", ["pieces", "bytes"])
def test_a_client_may_hold_what_it_leaves_free(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_queue, "MAX_WAITING", 8 if what == "pieces" else 1000)
    monkeypatch.setattr(text_queue, "MAX_WAITING_BYTES", 800 if what == "bytes" else 10**6)

    async def test(queue: TextQueue, held: Held) -> None:
        tasks: list[asyncio.Future[str]] = []

        def submit(client: str, is_answer: bool = False) -> None:
            coroutine = queue.run(
                held.work(client), client=client, num_bytes=100, is_answer=is_answer
            )
            tasks.append(asyncio.ensure_future(coroutine))

        async def is_refused(client: str) -> bool:
            try:
                coroutine = queue.run(held.work(client), client=client, num_bytes=100)
                await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(coroutine)), 0.01)
            except QueueFullError as error:
                assert error.status == 429 and error.retry_after_s >= 1
                assert "wait to be read" in error.message
                return True
            except asyncio.TimeoutError:
                return False
            return False

        for _ in range(4):
            submit("a")
        await asyncio.sleep(0)
        assert await is_refused("a"), "half of the room is its"
        submit("b")
        submit("b")
        await asyncio.sleep(0)
        assert await is_refused("b"), "half of the rest"
        submit("c")
        await asyncio.sleep(0)
        assert await is_refused("a")
        submit("a", is_answer=True)  # it ends a request: more has been spent on it
        await asyncio.sleep(0)
        for _ in tasks:
            held.gate.release()
        await asyncio.gather(*tasks)
        for _ in range(4):  # nothing is held any more
            submit("a")
        await asyncio.sleep(0)
        for _ in range(4):
            held.gate.release()
        await asyncio.gather(*tasks)

    run(test)


def test_what_nobody_waits_for_is_not_begun() -> None:
    async def test(queue: TextQueue, held: Held) -> None:
        running = [
            asyncio.ensure_future(queue.run(held.work("held"), client="a", num_bytes=LONG))
            for _ in range(2)
        ]
        gone = asyncio.ensure_future(queue.run(held.work("gone"), client="b", num_bytes=LONG))
        await until(lambda: len(held.begun) == 2)
        gone.cancel()
        running[0].cancel()  # it cannot be stopped; its thread is taken until it ends
        await asyncio.sleep(0)
        assert queue._held == {"a": (2, 2 * LONG)}
        held.gate.release()
        held.gate.release()
        assert await running[1] == "held"
        await until(lambda: not queue._held)
        assert held.begun == ["held", "held"] and queue._num_bytes_held == 0
        assert await queue.run(lambda: 5, client="b", num_bytes=LONG) == 5

    run(test)


def test_an_error_of_the_work_is_the_caller_s() -> None:
    async def test(queue: TextQueue, held: Held) -> None:
        def fail() -> None:
            raise ValueError("of the work")

        for num_bytes in (1, LONG, text_queue.TRIM_BYTES):
            with pytest.raises(ValueError, match="of the work"):
                await queue.run(fail, client="", num_bytes=num_bytes)
        assert queue._held == {}

    run(test)


MEASURE = """
import asyncio, sys
from pathlib import Path
from pyserve.api.text_queue import TextQueue
from pyserve.text.tokenizer import Tokenizer

def rss_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

async def main():
    tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
    queue = TextQueue()
    text = " " * 2**20
    def work():
        return len(tokenizer.encode(text, add_special_tokens=True))
    before = rss_mib()
    for _ in range(4):
        await asyncio.gather(*(queue.run(work, client=c, num_bytes=len(text)) for c in "ab"))
    print(rss_mib() - before)
    queue.close()

asyncio.run(main())
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this allocator is not glibc's"
)
def test_tokenising_a_million_characters_leaves_no_memory_taken(tokenizer_folder: Path) -> None:
    """It left 300 MB a thread to the allocator."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tokenizer_folder)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 50.0
