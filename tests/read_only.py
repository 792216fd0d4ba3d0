"""Folders that cannot be written, also for root: below one, what would change a file fails."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of the interpreter whose arguments begin with a path that they change.
CHANGES = {"os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"}
CREATES = {"os.mkdir": 0, "os.symlink": 1, "os.link": 1}  # which argument names what is new
EVENTS = {"open", "os.rename"} | CHANGES | set(CREATES)

_folders: list[Path] = []
_is_hooked = False


@contextmanager
def read_only(folder: Path) -> Iterator[list[str]]:
    """As a file system that is mounted read-only has it. Gives what was tried in vain."""
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_audit)  # there is no way to remove one
        _is_hooked = True
    tried.clear()
    _folders.append(folder)
    try:
        yield tried
    finally:
        _folders.pop()


tried: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _folders or event not in EVENTS:
        return
    for name in _changed(event, arguments):
        if any(Path(name).is_relative_to(folder) for folder in _folders):
            tried.append(f"{event} {name}")
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)


def _changed(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The paths that a call would change; none where the system finds another reason first."""
    if event == "open":
        is_written = arguments[2] & WRITING
        names = [arguments[0]] if is_written else []
    elif event == "os.rename":
        names = [arguments[0], arguments[1]]
    elif event in CREATES:
        names = [name for name in [arguments[CREATES[event]]] if not os.path.lexists(name)]
    else:
        names = [name for name in [arguments[0]] if not isinstance(name, int)]
        names = [name for name in names if os.path.lexists(name)]
    return [os.path.abspath(os.fsdecode(name)) for name in names if not isinstance(name, int)]
