"""Logging: short lines on stderr. Libraries log from WARNING on.

Logging never blocks on a slow reader of the log: a thread writes the lines, and lines that do not
fit its queue are dropped and counted. So a paused terminal or a hanging log collector costs lines,
but does not delay answers.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TextIO

MAX_WAITING_LINES = 2_000
MAX_WAITING_CHARS = 2**20
FLUSH_S = 1.0  # how long an ending process waits for the reader of its last lines
# Indents the second and later lines of a message, so that text from outside cannot imitate a log
# line.
CONTINUED = "    "
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def setup(level: str, prefix: str = "") -> None:
    """Log from `level` ("debug", "info", ...) on. Calling it again replaces the earlier set-up.

    prefix  put before each message, to tell which process logs it.
    """
    root = logging.getLogger()
    flush()
    for old in [h for h in root.handlers if isinstance(h, _QueueHandler)]:
        root.removeHandler(old)
    handler = _QueueHandler(_Writer(sys.stderr))
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    get_logger().setLevel(level.upper())


def get_logger() -> logging.Logger:
    """The logger that all of pyserve uses."""
    return logging.getLogger("pyserve")


def flush(timeout_s: float = FLUSH_S) -> None:
    """Wait until all lines so far are written, for at most timeout_s. For a process that ends."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _QueueHandler):
            handler.writer.wait_empty(timeout_s)


def draw(text: str, *, is_optional: bool = True) -> None:
    """Write text as it is, such as a progress bar.

    is_optional  drop the text if earlier text still waits to be written.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _QueueHandler):
            (handler.writer.offer if is_optional else handler.writer.put)(text)


def printable(text: str) -> str:
    r"""`text` with control characters escaped, such as \x1b; line feeds and tabs are kept."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        first, *rest = printable(super().format(record)).split("\n")
        return "\n".join([first, *(_continued(line) for line in rest)])


def _continued(line: str) -> str:
    return line if not line or line.startswith(" ") else CONTINUED + line


class _QueueHandler(logging.Handler):
    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self.writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.put(self.format(record) + "\n")
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait for the writer; logging.shutdown() calls this at the end of the process."""
        self.writer.wait_empty(FLUSH_S)


class _Writer:
    """Writes text to one stream, in order, from a thread that starts with the first text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._texts: deque[str] = deque()
        self._num_chars = 0
        self._num_dropped = 0
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def put(self, text: str) -> None:
        """Queue text without waiting for the stream; beyond the limits, drop and count it."""
        with self._changed:
            if len(self._texts) >= MAX_WAITING_LINES or self._num_chars >= MAX_WAITING_CHARS:
                self._num_dropped += 1
            else:
                self._append(text)

    def offer(self, text: str) -> None:
        """Queue text, unless other text still waits to be written; then drop it uncounted."""
        with self._changed:
            if not self._texts and not self._is_writing:
                self._append(text)

    def wait_empty(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while self._texts or self._is_writing:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    return
                self._changed.wait(left_s)

    def _append(self, text: str) -> None:
        self._texts.append(text)
        self._num_chars += len(text)
        if self._thread is None:
            # A daemon thread, so that a reader that hangs for ever does not keep the process alive.
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._texts:
                    self._changed.wait()
                text = "".join(self._texts)
                if self._num_dropped:
                    text += f"... {self._num_dropped} lines left out: the log's reader is slow\n"
                self._texts.clear()
                self._num_chars = self._num_dropped = 0
                self._is_writing = True
            _write(self._stream, text)
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()


def _write(stream: TextIO, text: str) -> None:
    """Write all of `text`, however long the reader takes; give up if the reader has gone."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # the stream has no file, as in tests, or is closed
        with suppress(ValueError):
            stream.write(text)
        return
    # This bypasses the stream's buffer: if this thread held the buffer's lock while it waits, the
    # interpreter's shutdown would fail with an error.
    rest = text.encode(errors="backslashreplace")
    while rest:
        try:
            rest = rest[os.write(number, rest) :]
        except BlockingIOError:  # another process, such as the shell, has made it non-blocking
            time.sleep(0.05)
        except OSError:
            return
