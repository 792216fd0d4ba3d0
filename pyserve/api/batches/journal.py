"""The answers of a batch while it runs: a file that only grows, and survives a kill at any byte.

    {"journal": 1, "input": "<sha256>", "num_lines": 10000}     of which batch it is
    17\t{"id": ..., "custom_id": ...}                           number of the line, its answer
    3\t{...}                                                    in the order in which they come

Each line is written by one call and belongs to the file once its line feed does: what a kill leaves
of a line is cut off when the file is opened again. The system writes it to disk within FSYNC_S.
At the end the answers are copied in the order of the input into a file of their own, which takes
its name only when all of it is on disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
from array import array
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

import msgspec

from pyserve.errors import PyserveError

FSYNC_S = 1.0
VERSION = 1
COPY_BYTES = 2**20


class JournalError(PyserveError):
    """The file cannot be opened, written or continued; the message names it."""


class _Head(msgspec.Struct):
    journal: int
    input: str
    num_lines: int


class Journal:
    """One open file, locked: no other process writes it.

    num_done    lines that have an answer.
    num_failed  of these, refused or failed.
    """

    def __init__(self, path: Path, *, input_digest: str, num_lines: int) -> None:
        """Open or make it. Raises JournalError: it is in use, of another input, or not writable."""
        self.path = path
        self._offsets = array("q", [-1]) * num_lines
        self.num_done = self.num_failed = 0
        self._is_dirty = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _failed(path, error) from None
        try:
            self._lock()
            self._end = self._read(_Head(VERSION, input_digest, num_lines))
        except BaseException:
            os.close(self._file)
            raise

    @property
    def num_lines(self) -> int:
        """Of the input."""
        return len(self._offsets)

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self._end

    def is_done(self, number: int) -> bool:
        return self._offsets[number] >= 0

    def put(self, number: int, line: bytes, *, has_failed: bool) -> None:
        """Add the answer of a line that has none. Raises JournalError, and keeps nothing of it."""
        assert not self.is_done(number), "answered twice"
        offset = self._end
        self._append(b"%d\t%s" % (number, line))
        self._offsets[number] = offset
        self.num_done += 1
        self.num_failed += has_failed

    def sync(self) -> None:
        """Wait until all that was put is on disk; from any thread. Raises JournalError."""
        if self._is_dirty:
            self._is_dirty = False
            try:
                os.fsync(self._file)
            except OSError as error:
                raise _failed(self.path, error) from None

    def copy(self, path: Path, is_wanted: Callable[[bytes], bool] = lambda line: True) -> int:
        """Write the answers in the order of their lines to `path`; returns how many lines.

        The file is there whole or not at all. Raises JournalError.
        """
        part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        num_lines = 0
        try:
            with part.open("wb", buffering=COPY_BYTES) as sink, self.path.open("rb") as source:
                for offset in self._offsets:
                    if offset < 0:
                        continue
                    source.seek(offset)
                    line = source.readline().partition(b"\t")[2]
                    if is_wanted(line):
                        sink.write(line)
                        num_lines += 1
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise _failed(path, error) from None
        return num_lines

    def remove(self) -> None:
        """Its answers are elsewhere now."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise _failed(self.path, error) from None
            raise JournalError(f"{self.path}: another process writes it") from None

    def _read(self, head: _Head) -> int:
        """Take over what is there, cut off half a line; returns where the next one begins."""
        with self.path.open("rb") as file:
            first = file.readline()
            if not first.endswith(b"\n"):  # new, or killed before its first line was whole
                return self._begin(head)
            self._check(first, head)
            end = len(first)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                number, tab, answer = line.partition(b"\t")
                if not tab or not number.isdigit() or int(number) >= len(self._offsets):
                    raise JournalError(f"{self.path}: the line at byte {end} is no answer")
                if not self.is_done(int(number)):
                    self._offsets[int(number)] = end
                    self.num_done += 1
                    self.num_failed += has_failed(answer)
                end += len(line)
        self._truncate(end)
        return end

    def _begin(self, head: _Head) -> int:
        self._truncate(0)
        self._end = 0
        self._append(msgspec.json.encode(head) + b"\n")
        self.sync()
        try:
            sync_folder(self.path.parent)
        except OSError as error:
            raise _failed(self.path, error) from None
        return self._end

    def _check(self, first: bytes, head: _Head) -> None:
        try:
            found = msgspec.json.decode(first, type=_Head)
        except msgspec.MsgspecError:
            raise JournalError(f"{self.path}: this is no file of a batch that was begun") from None
        if found != head:
            raise JournalError(
                f"{self.path}: it holds answers to another input of {found.num_lines} lines; "
                "remove it to begin anew, or name another output"
            )

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file, view[done:], self._end + done)
        except OSError as error:
            self._truncate(self._end)
            raise _failed(self.path, error) from None
        self._end += len(data)
        self._is_dirty = True

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            raise _failed(self.path, error) from None


def has_failed(line: bytes) -> bool:
    """Whether the answer in a line of output is an error."""
    # By its end: nothing of what an answer says may be decoded for it.
    return not line.endswith(b',"error":null}\n')


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on disk. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _failed(path: Path, error: OSError) -> JournalError:
    return JournalError(f"{path}: {os.strerror(error.errno or 0)}")


def open_input(path: Path) -> BufferedReader:
    """Raises JournalError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise _failed(path, error) from None
