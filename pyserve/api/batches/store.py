"""Store: the files and batches of clients, in a folder that outlives the process.

    lock                     locked while a server uses the folder
    files/<id>, <id>.json    content of a file, from a client or a batch; its owner and description
    batches/<id>.json        owner and description of a batch
    batches/<id>.journal     its answers while it runs
    new/                     files that are not complete yet; emptied at the start

Every .json file is written under another name and then renamed, and the content of a file is in
place before its .json. So after a kill each file is complete, or is removed at the next start.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from pyserve.api.batches.journal import sync_folder
from pyserve.api.wire.batches import Batch, FileObject
from pyserve.errors import InvalidRequestError, NotFoundError, RequestError, StartupError
from pyserve.log import get_logger

OVERHEAD_BYTES = 4096  # counted for each file and batch beside its content
MIN_FREE_BYTES = 2**26  # free space that is left on the disk
MAX_FILES = 10_000  # of all owners together; each owner may have an equal share of them
FILES_OF_A_BATCH = 2  # a batch writes an output file and an error file
MAX_BATCHES = 10_000  # beyond this the oldest ended batch is dropped, as clients cannot delete any
ENDED = ("failed", "completed", "expired", "cancelled")
_ID = re.compile(r"(file|batch)[-_][0-9a-f]{32}")

T = TypeVar("T")


class StorageError(RequestError):
    """507: the folder or its disk is full, or cannot be written."""

    status = 507
    type = "InsufficientStorageError"


class _OwnedFile(msgspec.Struct, frozen=True):
    owner: str
    file: FileObject


class _OwnedBatch(msgspec.Struct, frozen=True):
    owner: str
    batch: Batch


class Store:
    """The folder's contents. It is read once at the start; later look-ups are made in memory.

    max_file_bytes     maximum size of one file.
    max_bytes          maximum size of all files, journals and descriptions together.
    num_owners         number of owners that share MAX_FILES.
    num_upload_bytes   bytes of files that are being uploaded.
    num_journal_bytes  bytes of the journals of running batches.
    changing           lock that is held while batches are changed, as threads do that.
    """

    def __init__(
        self, folder: Path, *, max_file_bytes: int, max_bytes: int, num_owners: int = 1
    ) -> None:
        """Raises StartupError where the folder cannot be used, or another server uses it."""
        self.folder = folder
        self.max_file_bytes = max_file_bytes
        self.max_bytes = max_bytes
        self._num_owners = max(num_owners, 1)
        self._files: dict[str, _OwnedFile] = {}
        self._batches: dict[str, _OwnedBatch] = {}
        self.num_upload_bytes = 0
        self.num_journal_bytes = 0
        self._num_kept_bytes = 0
        self.changing = threading.RLock()
        try:
            for name in ("files", "batches", "new"):
                (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"--batch-dir {folder}: {os.strerror(error.errno or 0)}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except OSError as error:
            os.close(self._lock)
            is_held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            reason = "another server has it" if is_held else os.strerror(error.errno or 0)
            raise StartupError(f"--batch-dir {folder}: {reason}") from None

    def close(self) -> None:
        os.close(self._lock)

    @property
    def num_bytes(self) -> int:
        """Bytes that count against max_bytes."""
        num_described = len(self._files) + len(self._batches)
        num_growing = self.num_upload_bytes + self.num_journal_bytes
        return self._num_kept_bytes + OVERHEAD_BYTES * num_described + num_growing

    def check_room(self, num_bytes: int) -> None:
        """Raise StorageError where the folder's limit or its disk has no room for `num_bytes`."""
        if self.num_bytes + num_bytes + OVERHEAD_BYTES > self.max_bytes:
            raise StorageError(
                f"files and batches take {self.num_bytes} bytes, with {num_bytes} more than the "
                f"{self.max_bytes} that they may (--batch-max-total-bytes); delete some"
            )
        free = shutil.disk_usage(self.folder).free
        if free - num_bytes < MIN_FREE_BYTES:
            raise StorageError(f"the disk has {free} bytes left, {num_bytes} more are too many")

    def check_count(self, owner: str, num_files: int = 1) -> None:
        """Raise StorageError where `owner` may not have `num_files` more.

        The files that its unfinished batches will write are counted already, so that a batch can
        always write its answers.
        """
        limit = MAX_FILES // self._num_owners
        num_own = sum(owned.owner == owner for owned in list(self._files.values()))
        num_due = FILES_OF_A_BATCH * sum(other == owner for other, _ in self.unfinished())
        if num_own + num_due + num_files > limit:
            raise StorageError(
                f"there are {num_own} files, and {num_due} that batches are to write, with "
                f"{num_files} more than the limit of {limit}; delete some"
            )

    # -- files -------------------------------------------------------------------------------------

    def new_path(self) -> Path:
        """A new path under which to write a file until it is complete."""
        return self.folder / "new" / secrets.token_hex(16)

    def add_file(self, owner: str, path: Path, *, filename: str, purpose: str) -> FileObject:
        """Store the complete file at `path`, which is moved into the store. Raises OSError."""
        file = FileObject(
            id=f"file-{secrets.token_hex(16)}", bytes=path.stat().st_size,
            created_at=int(time.time()), filename=filename, purpose=purpose,
        )  # fmt: skip
        os.replace(path, self.content_path(file.id))
        sync_folder(self.folder / "files")
        try:
            self._write("files", file.id, _OwnedFile(owner, file))
        except OSError:
            self.content_path(file.id).unlink(missing_ok=True)
            raise
        self._files[file.id] = _OwnedFile(owner, file)
        self._num_kept_bytes += file.bytes
        return file

    def file(self, owner: str, id: str) -> FileObject:
        """The description of a file. Raises NotFoundError where `owner` has none with this id."""
        return _own(self._files, owner, id, "file").file

    def files(self, owner: str) -> list[FileObject]:
        """All files of `owner`, the newest first."""
        return [
            owned.file for owned in reversed(list(self._files.values())) if owned.owner == owner
        ]

    def content_path(self, id: str) -> Path:
        return self.folder / "files" / id

    def delete_file(self, owner: str, id: str) -> None:
        """Delete a file.

        Raises NotFoundError, OSError, and InvalidRequestError where an unfinished batch needs it.
        """
        file = _own(self._files, owner, id, "file").file
        for owned in list(self._batches.values()):
            if owned.batch.input_file_id == id and owned.batch.status not in ENDED:
                raise InvalidRequestError(
                    f"it is the input of {owned.batch.id}, which has not ended"
                )
        (self.folder / "files" / f"{id}.json").unlink(missing_ok=True)
        self.content_path(id).unlink(missing_ok=True)
        del self._files[id]
        self._num_kept_bytes -= file.bytes

    # -- batches -----------------------------------------------------------------------------------

    def save(self, owner: str, batch: Batch) -> None:
        """Store a new batch, or a new state of a batch. Raises OSError."""
        with self.changing:
            self._write("batches", batch.id, _OwnedBatch(owner, batch))
            self._batches[batch.id] = _OwnedBatch(owner, batch)
            if len(self._batches) > MAX_BATCHES:
                ended = (id for id, owned in self._batches.items() if owned.batch.status in ENDED)
                oldest = next(ended, batch.id)
                if oldest != batch.id:
                    del self._batches[oldest]
                    (self.folder / "batches" / f"{oldest}.json").unlink(missing_ok=True)

    def change(self, owner: str, id: str, change: Callable[[Batch], Batch]) -> Batch:
        """Replace a batch by `change(batch)`; returns the new one.

        The lock is held meanwhile, so that no other change gets lost. `change` may return the same
        object to change nothing. Raises NotFoundError, OSError, and what `change` raises.
        """
        with self.changing:
            batch = self.batch(owner, id)
            changed = change(batch)
            if changed is not batch:
                self.save(owner, changed)
        return changed

    def batch(self, owner: str, id: str) -> Batch:
        """A batch by its id. Raises NotFoundError where `owner` has none with this id."""
        return _own(self._batches, owner, id, "batch").batch

    def batches(self, owner: str) -> list[Batch]:
        """All batches of `owner`, the newest first."""
        every = reversed(list(self._batches.values()))
        return [owned.batch for owned in every if owned.owner == owner]

    def unfinished(self) -> list[tuple[str, Batch]]:
        """All batches that have not ended, as (owner, batch), the oldest first."""
        every = [(owned.owner, owned.batch) for owned in list(self._batches.values())]
        return [(owner, batch) for owner, batch in every if batch.status not in ENDED]

    def journal_path(self, id: str) -> Path:
        return self.folder / "batches" / f"{id}.journal"

    # -- the disk ----------------------------------------------------------------------------------

    def _write(self, kind: str, id: str, value: object) -> None:
        path = self.new_path()
        data = msgspec.json.encode(value)
        try:
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(path, self.folder / kind / f"{id}.json")
            sync_folder(self.folder / kind)
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _read(self) -> None:
        for path in (self.folder / "new").iterdir():
            path.unlink()
        files = self._described("files", _OwnedFile)
        files.sort(key=lambda item: item.file.created_at)
        for owned in files:
            if self.content_path(owned.file.id).is_file():
                self._files[owned.file.id] = owned
                self._num_kept_bytes += owned.file.bytes
        batches = self._described("batches", _OwnedBatch)
        batches.sort(key=lambda item: item.batch.created_at)
        self._batches = {owned.batch.id: owned for owned in batches}
        for path in (self.folder / "files").iterdir():
            if _ID.fullmatch(path.name) and path.name not in self._files:
                path.unlink()  # a kill came before its .json was written, or after that was removed
        for path in (self.folder / "batches").glob("*.journal"):
            found = self._batches.get(path.stem)
            if found is None or found.batch.status in ENDED:
                path.unlink()

    def _described(self, kind: str, owned_type: type[T]) -> list[T]:
        found = []
        for path in (self.folder / kind).glob("*.json"):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=owned_type))
            except msgspec.MsgspecError:
                get_logger().warning("%s is not readable and is left out", path)
        return found


def _own(table: dict[str, T], owner: str, id: str, what: str) -> T:
    found = table.get(id)
    # What belongs to another owner is reported as not found, so that nobody learns which ids exist.
    if found is None or found.owner != owner:  # type: ignore[attr-defined]
        raise NotFoundError(f"No such {what}: {id[:100]}", "id")
    return found
