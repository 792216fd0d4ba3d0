"""Download: fetches files of a repository in parallel parts, and verifies their checksums.

While it is fetched, a file lies beside its future blob under a name of our own, with its full
length from the start. A journal records how many bytes of each part are there, so that even after
kill -9 the next start continues at the exact byte. A blob gets its name only when it is complete
and its checksum is right.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from pyserve import log
from pyserve.errors import StartupError
from pyserve.hub.client import HubClient, RemoteFile

PART_BYTES = 64 * 2**20
NUM_STREAMS = 8
REPORT_S = 0.25
DATA_SUFFIX, JOURNAL_SUFFIX = ".pyserve-data", ".pyserve-journal"
HEAD = struct.Struct("<QQ")  # head of a journal: size of the file, and of a part, in bytes
COUNT = struct.Struct("<Q")  # then for each part: how many bytes of it are there
HASH_BYTES = 8 * 2**20
GIT_BLOB_CHARS = 40

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


class PartialFile:
    """A blob that is being fetched. Its files are open from the first write until `finish`.

    done  for each part, how many of its bytes are there.
    """

    def __init__(self, blob: Path, file: RemoteFile) -> None:
        self.file = file
        self._blob = blob
        self._data_path = blob.with_name(blob.name + DATA_SUFFIX)
        self._journal_path = blob.with_name(blob.name + JOURNAL_SUFFIX)
        self._data_fd = self._journal_fd = -1
        self.done = self._read_journal() or [0] * self.num_parts

    @property
    def num_parts(self) -> int:
        return -(-self.file.size // PART_BYTES)

    @property
    def missing_bytes(self) -> int:
        return self.file.size - sum(self.done)

    def part(self, index: int) -> tuple[int, int]:
        """The offset of a part's first missing byte, and of the end of the part."""
        start = index * PART_BYTES
        return start + self.done[index], min(start + PART_BYTES, self.file.size)

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write the next bytes of part `index` at `offset`, then count them in the journal."""
        if self._data_fd < 0:
            self._open()
        view = memoryview(data)
        while view:
            count = os.pwrite(self._data_fd, view, offset)
            view, offset = view[count:], offset + count
        self.done[index] += len(data)
        word = COUNT.pack(self.done[index])
        os.pwrite(self._journal_fd, word, HEAD.size + COUNT.size * index)

    def finish(self) -> bool:
        """Verify the checksum and give the blob its name.

        Returns False where the checksum is wrong; then the data is deleted.
        """
        if self._data_fd < 0:
            self._open()
        is_sound = _digest(self._data_fd, self.file) == self.file.etag
        if is_sound:
            # Sync before the blob gets its name: else a power cut could leave zeros of the right
            # size under that name.
            os.fdatasync(self._data_fd)
        self.close()
        if is_sound:
            os.replace(self._data_path, self._blob)
        else:
            self._data_path.unlink()
            self.done = [0] * self.num_parts
        self._journal_path.unlink()
        return is_sound

    def close(self) -> None:
        for fd in (self._data_fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        self._data_fd = self._journal_fd = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._blob.parent.mkdir(parents=True, exist_ok=True)
        self._data_fd = os.open(self._data_path, flags, 0o666)
        os.ftruncate(self._data_fd, self.file.size)
        self._journal_fd = os.open(self._journal_path, flags, 0o666)
        os.ftruncate(self._journal_fd, 0)
        words = b"".join(COUNT.pack(done) for done in self.done)
        os.pwrite(self._journal_fd, HEAD.pack(self.file.size, PART_BYTES) + words, 0)

    def _read_journal(self) -> list[int] | None:
        """The `done` of an earlier run; None where there is none, or its sizes are different."""
        try:
            text = self._journal_path.read_bytes()
            if self._data_path.stat().st_size != self.file.size:
                return None
        except FileNotFoundError:
            return None
        wanted = HEAD.size + COUNT.size * self.num_parts
        if len(text) != wanted or HEAD.unpack_from(text) != (self.file.size, PART_BYTES):
            return None
        done = [count for (count,) in COUNT.iter_unpack(text[HEAD.size :])]
        sizes = (
            min(PART_BYTES, self.file.size - index * PART_BYTES) for index in range(self.num_parts)
        )
        return [min(count, size) for count, size in zip(done, sizes, strict=True)]


class Download:
    """Fetches files of one commit into the cache.

    named     how messages call the model.
    progress  called with the bytes fetched so far, and the bytes to fetch in all.
    done      bytes fetched so far.
    """

    def __init__(self, client: HubClient, *, named: str, commit: str, progress: Progress) -> None:
        self._client = client
        self._named = named
        self._commit = commit
        self._progress = progress
        self._total = 0
        self.done = 0
        self._queue: deque[tuple[PartialFile, int]] = deque()
        self._was_damaged: set[str] = set()  # names of files that have failed their checksum once
        self._finishing: set[asyncio.Future[bool]] = set()  # on threads, so not to be cancelled

    def expect(self, num_bytes: int) -> None:
        """Set how many bytes are to be fetched in all, with those that `run` has fetched before."""
        self._total = num_bytes
        self._progress(self.done, self._total)

    async def run(self, partials: Iterable[PartialFile]) -> None:
        """Fetch until all `partials` are blobs. Raises StartupError, and OSError of the disk."""
        partials = list(partials)
        for partial in partials:
            self._add(partial)
        workers = [asyncio.create_task(self._work()) for _ in range(NUM_STREAMS)]
        reporter = asyncio.create_task(self._report())
        try:
            await asyncio.gather(*workers)
            self._progress(self.done, self._total)
        finally:
            for task in (*workers, reporter):
                task.cancel()
            await asyncio.gather(*workers, reporter, *self._finishing, return_exceptions=True)
            for partial in partials:
                partial.close()

    def _add(self, partial: PartialFile) -> None:
        parts = [index for index in range(partial.num_parts) if not _is_whole(partial, index)]
        # Index -1 stands for a file whose bytes are all there and only need to be verified.
        self._queue.extend((partial, index) for index in parts or [-1])

    async def _work(self) -> None:
        while self._queue:
            partial, index = self._queue.popleft()
            if index >= 0:
                start, end = partial.part(index)

                def write(
                    offset: int, data: bytes, partial: PartialFile = partial, index: int = index
                ) -> None:
                    partial.write(index, offset, data)
                    self.done += len(data)

                await self._client.fetch(partial.file, start, end, commit=self._commit, write=write)
            if partial.missing_bytes == 0:
                await self._finish(partial)

    async def _finish(self, partial: PartialFile) -> None:
        finishing = asyncio.ensure_future(asyncio.to_thread(partial.finish))
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)
        if await asyncio.shield(finishing):
            return
        name = partial.file.name
        if name in self._was_damaged:
            raise StartupError(
                f"{self._named}: {name} arrives damaged: its checksum is not the one listed"
            )
        self._was_damaged.add(name)
        log.get_logger().warning("%s: %s is damaged, fetching it again", self._named, name)
        self._total += partial.file.size
        self._add(partial)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            self._progress(self.done, self._total)


def size_text(num_bytes: float) -> str:
    """A number of bytes for people to read, such as "1.20 GB" or "340.0 MB"."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB"


def _is_whole(partial: PartialFile, index: int) -> bool:
    start, end = partial.part(index)
    return start == end


def _digest(fd: int, file: RemoteFile) -> str:
    """The checksum of the data in the form of its ETag: git's blob id, or SHA-256."""
    digest = hashlib.sha256()
    if len(file.etag) == GIT_BLOB_CHARS:
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    offset = 0
    while data := os.pread(fd, HASH_BYTES, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()
