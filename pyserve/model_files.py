"""Reads files of models, which come from strangers and may make libraries fail in any way.

Only regular files are read, and only up to a size: a pipe might never end, and /dev/zero would fill
the memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyserve.errors import CheckpointError, PyserveError
from pyserve.log import get_logger

MAX_TEXT_BYTES = 128 * 2**20  # any file but weights; the largest tokenizers have 40 MB
MAX_OBJECT_BYTES = 16 * 2**20  # JSON that is decoded to Python objects, which take 20 times as much
MAX_REASON_CHARS = 200

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]").search


@contextmanager
def guarded(where: str) -> Iterator[None]:
    """A context that turns what a library raises into a CheckpointError that names `where`.

    That includes panics of libraries in Rust, which are not Exceptions. Our own errors pass
    unchanged.
    """
    try:
        yield
    except PyserveError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        get_logger().debug("%s", where, exc_info=True)
        raise CheckpointError(f"{where}: cannot be used ({reason_of(error)})") from error


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a panic of a library in Rust, by its name: no import gives its class."""
    return type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """The first line of a library's error message, shortened."""
    line = str(error).strip().partition("\n")[0][:MAX_REASON_CHARS]
    return line or type(error).__name__


def open_regular(path: Path) -> int:
    """Open a regular file; returns a file descriptor for reading.

    Raises FileNotFoundError where it does not exist, and CheckpointError for all else. A link to
    nothing counts as a file whose content is lost, as in a cache that was cleaned in part, and not
    as one that the folder does not have.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise CheckpointError(f"{shown(path)}: is a link to a file that is gone") from error
        raise
    except (OSError, ValueError) as error:  # an invalid name raises one or the other
        reason = (isinstance(error, OSError) and error.strerror) or "no name of a file"
        raise CheckpointError(f"{shown(path)}: cannot be read: {reason}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: cannot be read: not a regular file")
    return fd


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes | None:
    """The contents of a file; None where there is none. Raises CheckpointError, also where it has
    more than `limit` bytes.
    """
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        num_bytes = os.fstat(fd).st_size
        if num_bytes > limit:
            raise CheckpointError(f"{path}: has {num_bytes} bytes, the limit is {limit}")
        try:
            return file.read(limit)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str | None:
    """The text of a UTF-8 file without a byte order mark; None where there is no file.

    Raises CheckpointError.
    """
    content = read_bytes(path, limit)
    try:
        return None if content is None else content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 (byte {error.start})") from error


def read_object(path: Path, limit: int = MAX_OBJECT_BYTES) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises CheckpointError."""
    content = read_bytes(path, limit)
    return None if content is None else decode_object(content, str(path))


def read_list(path: Path, limit: int = MAX_OBJECT_BYTES) -> list[Any] | None:
    """The JSON list in a file; None where there is no file. Raises CheckpointError."""
    content = read_bytes(path, limit)
    if content is None:
        return None
    value = _decode(content, str(path))
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: must hold a JSON list, not {type(value).__name__}")
    return value


def decode_object(text: bytes, where: str) -> dict[str, Any]:
    """Decode a JSON object. Raises CheckpointError, which names `where`.

    Like Python's json it accepts NaN and Infinity; whoever reads the values must refuse those.
    """
    value = _decode(text, where)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must hold a JSON object, not {type(value).__name__}")
    return value


def _decode(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text.decode("utf-8-sig"))
        if _SURROGATE(text):
            _refuse_surrogates(value, where)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {reason_of(error)}") from error
    return value


def _refuse_surrogates(value: object, where: str) -> None:
    """Raise CheckpointError for unpaired surrogates, which no library accepts in text."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{where} is not Unicode text: {value!r:.80}") from error
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, f"{where}: a key")
            _refuse_surrogates(item, f"{where}: {key[:80]}")
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item, where)


def shown(path: Path, limit: int = 1000) -> str:
    """A path for a message, cut to `limit` characters."""
    text = str(path)
    return text if len(text) <= limit else f"{text[:limit]}..."
