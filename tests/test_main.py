"""Ctrl-C at any moment of the start of the real process: a line at most, exit code 130."""

from __future__ import annotations

import os
import pty
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INTERRUPTED = 130
TIMEOUT_S = 60.0
PLAN = ("plan", "--model", str(ROOT / "pyserve" / "demo"))
# What the process has just imported, in the order in which it does.
MODULES = ("pyserve.log", "asyncio", "aiohttp", "tokenizers", "pyserve.api.serve", "pyserve.flags")


@contextmanager
def process(*arguments: str, python: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, *python, "-m", "pyserve", *arguments]
    popen = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, bufsize=0
    )
    try:
        yield popen
    finally:
        popen.kill()
        popen.communicate(timeout=TIMEOUT_S)


def read_until(popen: subprocess.Popen[bytes], word: bytes) -> bytes:
    """What it writes on stderr, until `word` is in it."""
    assert popen.stderr is not None
    deadline = time.monotonic() + TIMEOUT_S
    seen = b""
    with selectors.DefaultSelector() as selector:
        selector.register(popen.stderr, selectors.EVENT_READ)
        while word not in seen:
            assert selector.select(deadline - time.monotonic()), seen
            piece = os.read(popen.stderr.fileno(), 65536)
            assert piece, seen
            seen += piece
    return seen


@pytest.mark.parametrize("module", MODULES)
def test_ctrl_c_during_the_imports(module: str) -> None:
    """-X importtime tells of each import as it ends."""
    with process("--device", "cpu", "--port", "0", python=("-X", "importtime")) as popen:
        read_until(popen, b"pyserve.log\n")  # the handler is older than the first of them
        if module != "pyserve.log":
            read_until(popen, f"{module}\n".encode())
        popen.send_signal(signal.SIGINT)
        _, rest = popen.communicate(timeout=TIMEOUT_S)
    assert popen.returncode == INTERRUPTED
    lines = [line for line in rest.decode().splitlines() if not line.startswith("import time:")]
    # The last line of the imports may be broken off by ours, or by one that the start has to say.
    said = re.compile(r".*(interrupted|(\d\d:){2}\d\d (INFO|WARNING) .*)")
    assert [line for line in lines if not said.fullmatch(line)] == []
    # It may have come to the handler of the start, which says it in other words.
    assert lines[-1].endswith(("interrupted", "told to stop while starting"))


def test_the_first_line_comes_before_what_serves_is_imported() -> None:
    with process("--device", "cpu", "--port", "0", python=("-X", "importtime")) as popen:
        seen = read_until(popen, b"is starting (model pyserve-demo)\n")
    assert not re.search(rb"\| +(aiohttp|tokenizers|jinja2|torch)\n", seen)


@pytest.mark.parametrize("delay_s", [0.3, 1.0])
def test_ctrl_c_during_plan(delay_s: float) -> None:
    """It imports torch on the main thread."""
    with process(*PLAN, python=("-X", "importtime")) as popen:
        read_until(popen, b"pyserve.log\n")
        time.sleep(delay_s)
        popen.send_signal(signal.SIGINT)
        _, rest = popen.communicate(timeout=TIMEOUT_S)
    assert popen.returncode == INTERRUPTED
    assert b"Traceback" not in rest and b"KeyboardInterrupt" not in rest


@pytest.mark.parametrize("delay_s", [0.05, 0.2, 0.4, 0.8, 1.6])
def test_ctrl_c_after_a_while(delay_s: float, tmp_path: Path) -> None:
    """Counted from when the interpreter has come to us: before, it prints what it will."""
    ready_file = tmp_path / "ready"
    flags = ("--device", "cpu", "--host", "127.0.0.1", "--port", "0")
    with process(*flags, "--ready-file", str(ready_file), python=("-X", "importtime")) as popen:
        read_until(popen, b"pyserve.log\n")
        time.sleep(delay_s)
        popen.send_signal(signal.SIGINT)
        _, rest = popen.communicate(timeout=TIMEOUT_S)
        assert not ready_file.exists()
    log = [line for line in rest.decode().splitlines() if not line.startswith("import time:")]
    was_ready = any("pyserve is ready on" in line for line in log)
    assert popen.returncode == (0 if was_ready else INTERRUPTED), log
    assert not any("Traceback" in line or "ERROR" in line for line in log), log
    told = [line for line in log if "interrupted" in line or "told to stop" in line]
    assert len(told) == (0 if was_ready else 1), log


def test_ctrl_c_on_a_terminal_takes_the_bar_away() -> None:
    """The terminal signals the whole group, here as there; the bar must not stay."""
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "pyserve", "--device", "cpu", "--host", "127.0.0.1"]
    popen = subprocess.Popen(
        [*command, "--port", "0"], stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while b"so far" not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(main, 65536)
        os.killpg(popen.pid, signal.SIGINT)
        while True:
            try:
                seen += os.read(main, 65536)
            except OSError:  # the other end is closed
                break
        assert popen.wait(TIMEOUT_S) == INTERRUPTED
    finally:
        popen.kill()
        popen.wait(TIMEOUT_S)
        os.close(main)
    text = seen.decode()
    assert "Traceback" not in text and "told to stop while starting" in text
    assert text.rstrip("\r\n").rpartition("\x1b[K")[2].endswith("told to stop while starting")
