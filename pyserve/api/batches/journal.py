"""Journal: the answers of a batch while it runs, in an append-only file that survives a kill.

    {"journal": 1, "input": "<sha256>", "num_lines": 10000}     identifies the batch's input
    17\t{"id": ..., "custom_id": ...}                           number of an input line, its answer
    3\t{...}                                                    in the order in which they arrive

A line counts once its line feed has been written. If the process is killed while it writes a line,
the rest of that line is cut off when the file is opened again. The caller syncs the file to disk
every FSYNC_S. At the end the answers are copied, in the order of the input, into an output file,
which gets its name only when all of it is on disk.
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
    """The journal, or a file of the batch, cannot be used; the message names it."""


class _Head(msgspec.Struct):
    journal: int
    input: str
    num_lines: int


class Journal:
    """One open journal. It is locked, so that no other process writes to it.

    num_done    number of input lines that have an answer.
    num_failed  number of those whose answer is an error.
    """

    def __init__(self, path: Path, *, input_digest: str, num_lines: int) -> None:
        """Open the journal at `path`, or create it.

        input_digest  SHA-256 of the input, which must match that of an existing journal.
        num_lines     number of lines of the input that are not blank.

        Raises JournalError where it is in use, belongs to another input, or cannot be written.
        """
        self.path = path
        self._offsets = array("q", [-1]) * num_lines  # where each line's answer is; -1: none yet
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
        """Number of lines of the input."""
        return len(self._offsets)

    @property
    def num_bytes(self) -> int:
        """Size of the journal, in bytes."""
        return self._end

    def is_done(self, number: int) -> bool:
        return self._offsets[number] >= 0

    def put(self, number: int, line: bytes, *, has_failed: bool) -> None:
        """Append the answer of line `number`, which has none yet; `line` ends in a line feed.

        Raises JournalError; then nothing of it is kept.
        """
        assert not self.is_done(number), "answered twice"
        offset = self._end
        self._append(b"%d\t%s" % (number, line))
        self._offsets[number] = offset
        self.num_done += 1
        self.num_failed += has_failed

    def sync(self) -> None:
        """Wait until all answers so far are on disk. For any thread. Raises JournalError."""
        if self._is_dirty:
            self._is_dirty = False
            try:
                os.fsync(self._file)
            except OSError as error:
                raise _failed(self.path, error) from None

    def copy(self, path: Path, is_wanted: Callable[[bytes], bool] = lambda line: True) -> int:
        """Write the answers that `is_wanted` accepts to `path`, in the order of the input.

        Returns the number of lines written. The file appears whole or not at all. Raises
        JournalError.
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
        """Delete the file, once its answers have been copied."""
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
        """Read the answers of an existing file and cut off a partial last line; else begin a file.

        Returns the offset at which the next line is to be written.
        """
        with self.path.open("rb") as file:
            first = file.readline()
            if not first.endswith(b"\n"):  # the file is new, or was killed in its first line
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
    """Whether a line of output, with its line feed, is an error."""
    # Looking at its end avoids decoding a whole answer; make_output puts `error` last.
    return not line.endswith(b',"error":null}\n')


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries (new and renamed files) are on disk. Raises OSError."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _failed(path: Path, error: OSError) -> JournalError:
    return JournalError(f"{path}: {os.strerror(error.errno or 0)}")


def open_input(path: Path) -> BufferedReader:
    """Open the input of a batch. Raises JournalError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise _failed(path, error) from None
