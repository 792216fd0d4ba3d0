"""The folders in which compiled products are kept, and whether what lies there may be loaded.

What is loaded from a cache runs as we do, so it must be ours: the folder, every folder above it and
the products belong to us or to root, and nobody else can write there. A mark beside the products
holds their sizes and hashes; it is written last, when they are on the disk, so that a power cut
leaves products that are compiled again instead of ones that end the process.
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
    """Why others could change what lies in `path`, a folder or a file; None where they cannot.

    What of it does not exist yet is not looked at. `path` holds no symbolic links.
    """
    for part in (path, *path.parents):
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        if found.st_uid not in _trusted_owners():
            return f"{part} belongs to {_user(found.st_uid)}"
        # In a sticky folder, such as /tmp, others can add entries but not touch ours.
        is_sticky = bool(found.st_mode & stat.S_ISVTX) and part != path
        if found.st_mode & stat.S_IWOTH and not is_sticky:
            return f"everybody can write to {part}"
        if found.st_mode & stat.S_IWGRP and not is_sticky and not _is_own_group(found.st_gid):
            return f"the group {_group(found.st_gid)} can write to {part}"
    return None


def make_folder(path: Path) -> None:
    """`path` and what is missing above it, whatever the umask says for us alone."""
    if path.parent != path and not path.parent.is_dir():
        make_folder(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise


def is_whole(folder: Path, names: Sequence[str]) -> bool:
    """True where the mark is there and the products are, byte for byte, what it says."""
    try:
        marked = json.loads((folder / MARK_NAME).read_bytes())
        return bool(marked == _digests(folder, names))
    except (OSError, ValueError):
        return False


def mark_whole(folder: Path, names: Sequence[str]) -> None:
    """Put the products on the disk, then the mark that tells of them."""
    for name in names:
        _sync(folder / name)
    mark = folder / f"{MARK_NAME}.new"
    mark.write_text(json.dumps(_digests(folder, names)), encoding="utf-8")
    _sync(mark)
    mark.replace(folder / MARK_NAME)
    _sync(folder)


def clear(folder: Path) -> None:
    """Remove all but the lock: what a power cut left may be short anywhere."""
    for path in folder.iterdir():
        if path.name == LOCK_NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Exclusive among processes; gives the file descriptor that holds it.

    While another holds it, `on_wait` is called every WAIT_POLL_S. The kernel releases it when its
    owner and all who inherited the descriptor have died: a compiler that outlives a killed owner
    does not write beside the next one's.
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
    """For products of this process alone; they may be deleted once they are loaded."""
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
            # In a user namespace the real root, and others outside, are shown as this one; no
            # process beside us can be it.
            owners.add(int(_OVERFLOW_UID.read_text()))
    except (OSError, ValueError):
        pass
    return owners


def _is_own_group(gid: int) -> bool:
    """root's, or the one that distributions make for each user alone."""
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
