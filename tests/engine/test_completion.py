"""CompletionThread on a driver of ours, whose events are pipes that a test writes to."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.ops import build

DRIVER = """
#include <unistd.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal > 7 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)5; return 0; }
int cuCtxSetCurrent(void* context) { return context == (void*)5 ? 0 : 201; }
int cuEventSynchronize(void* event) {
  char code = 0;
  return read((int)(long)event, &code, 1) == 1 ? code : 1;
}
int cuGetErrorName(int error, const char** name) { *name = "CUDA_ERROR_OF_TEST"; return 0; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None
    command = [compiler, "-shared", "-fPIC", "-o", "libdriver.so", "driver.c"]
    subprocess.run(command, cwd=folder, check=True)
    build.load_native(is_reference_allowed=False, progress=print)
    return str(folder / "libdriver.so")


class Event:
    """What cuEventSynchronize waits for: the read end of a pipe."""

    def __init__(self) -> None:
        self.handle, self._write_fd = os.pipe()

    def end(self, code: int = 0) -> None:
        os.write(self._write_fd, bytes([code]))

    def close(self) -> None:
        os.close(self.handle)
        os.close(self._write_fd)


@pytest.fixture
def events() -> Iterator[list[Event]]:
    made = [Event() for _ in range(4)]
    yield made
    for event in made:
        event.close()


@pytest.fixture
def thread(driver: str) -> Iterator[Any]:
    made = build.host().CompletionThread(driver, 0)
    yield made
    made.close()


def wait(thread: Any) -> list[tuple[int, str]]:
    readable, _, _ = select.select([thread.fileno()], [], [], 5.0)
    assert readable, "nothing completed"
    drained: list[tuple[int, str]] = thread.drain()
    return drained


def test_steps_complete_in_order(thread: Any, events: list[Event]) -> None:
    for step_id, event in enumerate(events):
        thread.watch(step_id, event.handle)
    assert thread.drain() == []
    events[2].end()  # nobody looks at it before those in front of it
    assert not select.select([thread.fileno()], [], [], 0.05)[0]
    events[0].end()
    assert wait(thread) == [(0, "")]
    events[1].end()
    events[3].end()
    completed: list[tuple[int, str]] = []
    while len(completed) < 3:
        completed += wait(thread)
    assert completed == [(1, ""), (2, ""), (3, "")]
    # The thread notes a completion before it says so: what says it may come behind the drain.
    time.sleep(0.05)
    assert thread.drain() == []
    assert not select.select([thread.fileno()], [], [], 0.05)[0]


def test_an_error_stays(thread: Any, events: list[Event]) -> None:
    thread.watch(7, events[0].handle)
    thread.watch(8, events[1].handle)
    events[0].end(code=100)
    completed: list[tuple[int, str]] = []
    while len(completed) < 2:  # the second is not waited for
        completed += wait(thread)
    assert completed == [(7, "CUDA_ERROR_OF_TEST"), (8, "CUDA_ERROR_OF_TEST")]


def test_close_leaves_a_hanging_event_behind(driver: str, events: list[Event]) -> None:
    thread = build.host().CompletionThread(driver, 0)
    thread.watch(0, events[0].handle)
    time.sleep(0.05)
    began = time.monotonic()
    thread.close()
    assert time.monotonic() - began < 20
    events[0].end()  # the thread is still there and may end now


def test_what_cannot_be_had_is_said(driver: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot open .*missing"):
        build.host().CompletionThread(str(tmp_path / "missing.so"), 0)
    with pytest.raises(RuntimeError, match="cuDeviceGet: CUDA_ERROR_OF_TEST"):
        build.host().CompletionThread(driver, 8)
