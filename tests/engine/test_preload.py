"""torch's libraries are mapped without torch, without the GIL, and `import torch` finds them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pyserve.engine import preload
from pyserve.engine.preload import Preload, preload_torch

PROGRAM = """
import sys, threading, time
from pyserve.engine.preload import preload_torch
worst = 0.0
done = threading.Event()
def tick():
    global worst
    last = time.perf_counter()
    while not done.is_set():
        time.sleep(0.002)
        now = time.perf_counter()
        worst = max(worst, now - last)
        last = now
thread = threading.Thread(target=tick)
thread.start()
began = time.perf_counter()
preload_torch()
took = time.perf_counter() - began
done.set()
thread.join()
assert "torch" not in sys.modules
assert "libtorch_cpu.so" in open("/proc/self/maps").read()
import torch
assert torch.ones(3).sum().item() == 3.0
print(took, worst)
"""


def test_the_libraries_are_mapped_and_other_threads_run_meanwhile() -> None:
    best = 1.0
    for _ in range(10):  # a busy machine may hold the other thread in one of them
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        took_s, worst_s = map(float, done.stdout.split())
        best = min(best, worst_s / took_s)
        if best < 0.5:
            return
    pytest.fail(f"the GIL was held for {best:.0%} of the time")


def test_a_missing_or_broken_torch_is_left_to_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    preload_torch()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch.so").write_bytes(b"not a library")
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    preload_torch()


DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static int said(const char* what, int device) {
  FILE* file = fopen(getenv("PYSERVE_TEST_CALLS"), "a");
  fprintf(file, "%s %d\\n", what, device);
  return fclose(file);
}
int cuInit(unsigned flags) { return said("init", (int)flags) || FAILS; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 7; return said("get", ordinal); }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  usleep(50000);
  *context = (void*)1;
  return said("retain", device);
}
"""


@pytest.mark.parametrize(
    ("is_card_wanted", "fails", "calls"),
    [
        (True, 0, ["init 0", "get 0", "retain 7"]),
        (True, 100, ["init 0"]),  # CUDA_ERROR_NO_DEVICE
        (False, 0, []),
    ],
)
def test_the_first_card_gets_the_context_that_torch_will_use(
    is_card_wanted: bool,
    fails: int,
    calls: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, said = tmp_path / "libdriver.so", tmp_path / "calls"
    source = DRIVER.replace("FAILS", str(fails)).encode()
    compiler = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(driver)]
    subprocess.run(compiler, input=source, check=True)
    said.touch()
    monkeypatch.setenv("PYSERVE_TEST_CALLS", str(said))
    monkeypatch.setattr(preload, "DRIVER_LIBRARY", str(driver))
    monkeypatch.setattr(preload, "preload_torch", lambda: None)
    started = Preload(is_card_wanted=is_card_wanted)
    started.wait()
    started.end()
    assert said.read_text().splitlines() == calls


def test_a_machine_without_a_driver_has_nothing_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "DRIVER_LIBRARY", "libcuda-of-nobody.so.1")
    started = Preload(is_card_wanted=True)
    started.end()
    assert started._card is None
