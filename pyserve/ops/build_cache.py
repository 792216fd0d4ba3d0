"""The cache folders of compiled products, and whether their contents may be loaded.

Code from a cache runs with our rights, so nobody else may be able to change it: the folder, every
folder above it and the products must belong to us or to root, and nobody else may write to them. A
mark file beside the products holds their sizes and hashes. It is written last, once the products
are on the disk, so that products which a power cut has damaged are compiled again instead of
crashing the process.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import json
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MARK_NAME = "whole.json"
LOCK_NAME = "lock"
WAIT_POLL_S = 0.5
_OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")
_UID_MAP = Path("/proc/self/uid_map")
_WHOLE_UID_MAP = ["0", "0", "4294967295"]


def untrusted_reason(path: Path) -> str | None:
    """Why other users could change `path`, a folder or a file; None if they cannot.

    Parts of the path that do not exist yet are skipped. `path` must contain no symbolic links.
    """
    for part in (path, *path.parents):
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        if found.st_uid not in _trusted_owners():
            return f"{part} belongs to {_user(found.st_uid)}"
        # In a sticky folder, such as /tmp, others can add entries but cannot change ours.
        is_sticky = bool(found.st_mode & stat.S_ISVTX) and part != path
        if found.st_mode & stat.S_IWOTH and not is_sticky:
            return f"everybody can write to {part}"
        if found.st_mode & stat.S_IWGRP and not is_sticky and not _is_own_group(found.st_gid):
            return f"the group {_group(found.st_gid)} can write to {part}"
    return None


def make_folder(path: Path) -> None:
    """Create `path` and missing folders above it, accessible to us only."""
    if path.parent != path and not path.parent.is_dir():
        make_folder(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise


def is_whole(folder: Path, names: Sequence[str]) -> bool:
    """Whether the mark exists and the products' sizes and hashes are as it says."""
    try:
        marked = json.loads((folder / MARK_NAME).read_bytes())
        return bool(marked == _digests(folder, names))
    except (OSError, ValueError):
        return False


def mark_whole(folder: Path, names: Sequence[str]) -> None:
    """Flush the products to the disk, then write the mark."""
    for name in names:
        _sync(folder / name)
    mark = folder / f"{MARK_NAME}.new"
    mark.write_text(json.dumps(_digests(folder, names)), encoding="utf-8")
    _sync(mark)
    mark.replace(folder / MARK_NAME)
    _sync(folder)


def clear(folder: Path) -> None:
    """Remove everything but the lock; after a power cut any file may be incomplete."""
    for path in folder.iterdir():
        if path.name == LOCK_NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the folder's lock, which only one process has; yields its file descriptor.

    While another process holds it, on_wait() is called every WAIT_POLL_S seconds. The kernel
    releases the lock only when its owner and all children that inherited the descriptor have ended,
    so a compiler that outlives a killed owner never writes beside the next owner's.
    """
    with (folder / LOCK_NAME).open("w") as lock_file:
        while True:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(WAIT_POLL_S)
        yield lock_file.fileno()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder for products of this process alone; loaded products outlive its deletion."""
    with tempfile.TemporaryDirectory(prefix="pyserve-native-") as name:
        yield Path(name).resolve()


def _digests(folder: Path, names: Sequence[str]) -> dict[str, list[int | str]]:
    digests: dict[str, list[int | str]] = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(2**20):
                digest.update(piece)
            digests[name] = [file.tell(), digest.hexdigest()]
    return digests


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _trusted_owners() -> set[int]:
    owners = {0, os.geteuid()}
    try:
        if _UID_MAP.read_text().split() != _WHOLE_UID_MAP:
            # In a user namespace, the real root and all other outside users appear as the overflow
            # uid, which no process inside the namespace can have.
            owners.add(int(_OVERFLOW_UID.read_text()))
    except (OSError, ValueError):
        pass
    return owners


def _is_own_group(gid: int) -> bool:
    """Whether it is root's group, or the private group that distributions create for a user."""
    if gid == 0:
        return True
    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    return (
        gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
