"""RepoCache: one repository in the hub's cache folder, in the layout of huggingface_hub.

    models--owner--name/blobs/ETAG          contents of files
                        snapshots/COMMIT/   links to blobs, under the file names of the repository
                        refs/REVISION       the commit that a branch or tag was last seen at
                        .pyserve/COMMIT.KIND  our note that all files of a Kind have been fetched
    .locks/models--owner--name/         locks, and during a download the headers of its weights

Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from huggingface_hub.file_download import repo_folder_name

from pyserve import log
from pyserve.hub.client import COMMIT, RemoteFile
from pyserve.hub.download import DATA_SUFFIX, JOURNAL_SUFFIX


class RepoCache:
    """The paths of one repository below the cache folder `root`, and which files are complete.

    `kind` is a files.Kind: which files of a repository are wanted.
    """

    def __init__(self, root: Path, repo: str) -> None:
        self.root = root
        name = repo_folder_name(repo_id=repo, repo_type="model")
        self._folder = root / name
        self.locks = root / ".locks" / name

    def commit_of(self, revision: str) -> str | None:
        """The commit that a revision was last seen at; None where it was never seen."""
        if COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self._folder / "refs" / revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if COMMIT.fullmatch(commit) else None

    def snapshot(self, commit: str) -> Path:
        return self._folder / "snapshots" / commit

    def blob(self, etag: str) -> Path:
        return self._folder / "blobs" / etag

    def is_whole(self, commit: str, kind: str) -> bool:
        """Whether `note_whole` was called, and all files are still there with the right size."""
        path = self._note(commit, kind)
        try:
            sizes = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
        except (OSError, msgspec.DecodeError):
            return False
        snapshot = self.snapshot(commit)
        return all(_size(snapshot / name) == size for name, size in sizes.items())

    def note_whole(self, revision: str, commit: str, kind: str, files: list[RemoteFile]) -> None:
        """Note that all `files` are complete, so that later starts need not call the hub."""
        path = self._note(commit, kind)
        try:
            self._set_ref(revision, commit)
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace_text(path, msgspec.json.encode({file.name: file.size for file in files}))
        except OSError as error:  # with a read-only cache every start calls the hub
            log.get_logger().debug("no note in the cache: %s", error.strerror)

    def has(self, commit: str, file: RemoteFile) -> bool:
        """Whether the file is in the snapshot, no matter which tool fetched it."""
        return _size(self.snapshot(commit) / file.name) == file.size

    def has_blob(self, file: RemoteFile) -> bool:
        return _size(self.blob(file.etag)) == file.size

    def link(self, commit: str, file: RemoteFile) -> None:
        """Link the file's blob into the snapshot, unless the file is there already."""
        if self.has(commit, file):
            return
        path, blob = self.snapshot(commit) / file.name, self.blob(file.etag)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            path.symlink_to(os.path.relpath(blob, path.parent))
        except OSError:  # the file system has no links, so the blob itself moves there
            os.replace(blob, path)

    def drop_partials(self, keep: set[str]) -> None:
        """Remove the partial files of earlier downloads, except those of the ETags in `keep`."""
        for suffix in (DATA_SUFFIX, JOURNAL_SUFFIX):
            for path in self.blob("x").parent.glob(f"*{suffix}"):
                if path.name.removesuffix(suffix) not in keep:
                    path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, named: str) -> Iterator[None]:
        """A lock, so that only one process at a time fetches the repository. Waits for it.

        named  how log lines call the model.
        """
        self.locks.mkdir(parents=True, exist_ok=True)
        with (self.locks / "pyserve.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.get_logger().info("%s: another process fetches it, waiting for that", named)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                log.get_logger().debug("no locks on this file system")
            yield

    def _set_ref(self, revision: str, commit: str) -> None:
        """Store the commit that a branch or tag points to."""
        if revision == commit or self.commit_of(revision) == commit:
            return
        path = self._folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_text(path, commit.encode())

    def _note(self, commit: str, kind: str) -> Path:
        return self._folder / ".pyserve" / f"{commit}.{kind}"


def _size(path: Path) -> int:
    """Size in bytes of a regular file, following links; -1 where there is none."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


def _replace_text(path: Path, text: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # such as a partial file on a full disk
        raise
