"""The logging set-up: level, one handler, libraries quiet."""

from __future__ import annotations

import io
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pyserve import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    levels = root.level, log.get_logger().level
    handlers = list(root.handlers)
    yield
    root.setLevel(levels[0])
    log.get_logger().setLevel(levels[1])
    root.handlers[:] = handlers


def test_an_event_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    log.get_logger().info("%d tokens", 5)
    log.flush()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO 5 tokens\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("level", "heard"),
    [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")],
)
def test_lines_below_the_level_are_dropped(
    capsys: pytest.CaptureFixture[str], level: str, heard: str
) -> None:
    log.setup(level)
    logger = log.get_logger()
    for say in (logger.debug, logger.info, logger.warning, logger.error):
        say(say.__name__[0])
    log.flush()
    assert "".join(line[-1] for line in capsys.readouterr().err.splitlines()) == heard


def test_libraries_are_heard_from_warning_on(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("debug")
    library = logging.getLogger("aiohttp.access")
    library.info("GET / 200")
    library.warning("odd")
    log.flush()
    assert capsys.readouterr().err.endswith("WARNING odd\n")


def test_setting_up_again_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    log.setup("info")
    log.get_logger().info("once")
    log.flush()
    assert capsys.readouterr().err.count("once") == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\rb\x00\x7f\x85\u2028", r"a\rb\x00\x7f\x85\u2028"),
        ("org/ñ\ttab", "org/ñ\ttab"),
        # What comes from outside cannot pass for a line of its own.
        ("a name\n12:00:00 INFO forged", "a name\n    12:00:00 INFO forged"),
        ("a ledger:\n  total  5 MiB", "a ledger:\n  total  5 MiB"),
    ],
)
def test_text_from_outside_is_shown_harmless(
    text: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.setup("info")
    log.get_logger().info("%s", text)
    log.flush()
    assert capsys.readouterr().err[len("12:00:00 INFO ") :] == shown + "\n"


def test_a_reader_that_stops_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb", buffering=0) as pipe:
        monkeypatch.setattr("sys.stderr", stream)
        log.setup("info")
        # More than a pipe holds: from the first byte on, the thread waits for the reader.
        log.get_logger().info("%s", "y" * 2**17)
        assert select.select([pipe], [], [], 10.0)[0]
        began_s = time.process_time()
        for number in range(10_000):
            log.get_logger().info("%06d %s", number, "x" * 200)
        assert time.process_time() - began_s < 2.0, "10,000 lines take 0.2 s"
        began_s = time.monotonic()
        log.flush(0.1)
        assert time.monotonic() - began_s < 10.0
        text = b""
        while b"left out" not in text:
            text += pipe.read(65536)
        log.get_logger().info("it goes on")
        while b"goes on" not in text:
            text += pipe.read(65536)
    lines = text.decode().splitlines()
    numbers = [int(line[14:20]) for line in lines if line.endswith("x")]
    (left_out,) = (int(line.split()[1]) for line in lines if "left out" in line)
    assert numbers == list(range(len(numbers))), "the first ones are whole and in order"
    assert len(numbers) + left_out == 10_000
    # Some are being written, some wait.
    assert len(numbers) <= 2 * log.MAX_WAITING_LINES


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stream_that_was_closed_takes_the_lines_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    log.setup("info")
    stream.close()
    log.get_logger().info("nobody hears this")
    log.flush()
    threads = [thread for thread in threading.enumerate() if thread.name == "log"]
    assert all(thread.is_alive() for thread in threads) and threads


def test_an_ending_process_waits_for_its_lines_but_not_for_ever() -> None:
    code = (
        "from pyserve import log\nlog.setup('info')\n"
        "for n in range(1000): log.get_logger().info('%d %s', n, 'x' * 100)"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert len(done.stderr.splitlines()) == 1000
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as stuck:
        assert stuck.wait(timeout=30) == 0
        assert stuck.stderr is not None and b"\n" in stuck.stderr.read()
