"""Resolves the name of a model or an adapter to a local folder, downloading it if needed.

A name of a folder is used as it is; any other is a repository of the hub. Only files that the
server reads are fetched, all of one commit: config, tokenizer and safetensors files, but no code,
no pickles and no second format. A model that is complete in the cache is served without a call to
the hub; so a branch stays at the commit that was fetched, until another tool updates the cache's
ref. Imports no torch.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_token

from pyserve import __version__, log
from pyserve.errors import CheckpointError, ConfigError, StartupError
from pyserve.hub.cache import RepoCache
from pyserve.hub.client import HubClient, Listing, RemoteFile, UnreachableError
from pyserve.hub.download import Download, PartialFile, Progress, size_text
from pyserve.hub.files import (
    ADAPTER_TEXT,
    Kind,
    describing_texts,
    likely_weights,
    looks_whole,
    may_be_served,
    refuse_lfs_pointers,
    served_texts,
    served_weights,
    write_headers,
)
from pyserve.model_files import MAX_TEXT_BYTES

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]{0,199}")
TOKEN = re.compile(r"[!-~]{1,4096}")


MAX_TEXTS_BYTES = 512 * 2**20  # all files of a model together, except for the weights
DISK_MARGIN_BYTES = 256 * 2**20  # left for logs, compiled products and the file system itself

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)

Check = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One repository at one revision."""

    repo: str
    revision: str
    named: str  # how messages call it: the flag and its value
    token: str | bool | None  # True: there must be one that `hf auth login` has stored
    cache: RepoCache
    kind: Kind

    def client(self) -> HubClient:
        headers = {"User-Agent": f"pyserve/{__version__}"}
        token = self.token
        if token is True or not (token or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN):
            token = get_token()
        if token is None and self.token is True:
            raise ConfigError(
                "--hf-token without a value takes the token that is kept, and none is: "
                "run hf auth login, set HF_TOKEN, or pass the token"
            )
        if token:
            assert isinstance(token, str)
            if not TOKEN.fullmatch(token.strip()):
                raise ConfigError("the access token of the hub holds spaces or special characters")
            headers["Authorization"] = f"Bearer {token.strip()}"
        return HubClient(
            self.repo, self.revision, named=self.named, endpoint=constants.ENDPOINT, headers=headers
        )


def resolve_model(
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    download_dir: Path | None,
    flag: str = "--model",
    has_weights: bool = True,
    progress: Progress = lambda done, total: None,
    check: Check = lambda folder: None,
) -> Path:
    """The local folder of a model. `name` is a folder, or a repository of the hub, "owner/model".

    A repository is fetched into `download_dir`, or into the hub's own cache where that is None.
    Files that are there already are not fetched again.

    token        True: the one that `hf auth login` has stored; None: likewise, if there is one.
    has_weights  False: fetch only the config and tokenizer files.
    progress     called on this thread with the bytes fetched so far, and the bytes in all.
    check        called before any weights are fetched, with a folder that holds config.json and
                 safetensors files with headers but no data. What it raises ends the download.

    Raises StartupError that names `flag`.
    """
    folder = _local_folder(name, revision, flag)
    if folder is not None:
        return folder
    kind: Kind = "model" if has_weights else "texts"
    wanted = _wanted(name, revision, token, download_dir, flag=flag, kind=kind)
    return _resolve(wanted, progress, check)


def resolve_adapter(
    name: str, *, flag: str, token: str | bool | None, download_dir: Path | None,
    progress: Progress = lambda done, total: None,
) -> Path:  # fmt: skip
    """The local folder of an adapter, which is found and fetched as by resolve_model.

    Only its config and its safetensors file are fetched. Raises StartupError that names `flag`.
    """
    folder = _local_folder(name, None, flag)
    if folder is not None:
        return folder
    wanted = _wanted(name, None, token, download_dir, flag=flag, kind="adapter")
    return _resolve(wanted, progress, lambda folder: None)


def _resolve(wanted: _Wanted, progress: Progress, check: Check) -> Path:
    """The snapshot folder in the cache, after fetching all wanted files that are missing."""
    snapshot = _without_a_call(wanted)
    if snapshot is not None:
        return snapshot
    progress(0, 0)
    try:
        listing = asyncio.run(_list(wanted))
        snapshot = _all_there(wanted, listing)
        if snapshot is None:
            # Lock only now that something will be written: the cache may be read-only.
            with wanted.cache.locked(wanted.named):
                snapshot = _cached(wanted) or asyncio.run(_fetch(wanted, listing, progress, check))
        return snapshot
    except UnreachableError as error:
        return _without_the_hub(wanted, str(error))
    except OSError as error:
        if error.errno in READ_ONLY and _served_as_it_is(wanted) is not None:
            return _without_the_hub(
                wanted, f"the newest commit cannot be kept in {wanted.cache.root}: {error.strerror}"
            )
        raise _disk_error(wanted, error) from error


@contextmanager
def model_headers(
    name: str, *, revision: str | None, token: str | bool | None, download_dir: Path | None
) -> Iterator[Path]:
    """A folder with the files that describe a model.

    That is the model's own folder if it is on this machine, else a temporary one with config.json
    and safetensors files that have headers but no data. Raises StartupError that names --model.
    """
    flag = "--model"
    folder = _local_folder(name, revision, flag)
    if folder is not None:
        yield folder
        return
    wanted = _wanted(name, revision, token, download_dir, flag=flag, kind="model")
    snapshot = _without_a_call(wanted)
    if snapshot is not None:
        yield snapshot
        return
    try:
        scratch = tempfile.TemporaryDirectory(prefix="pyserve-")
    except OSError as error:
        raise StartupError(
            f"{wanted.named}: no folder for temporary files can be written: set TMPDIR to one"
        ) from error
    with scratch:
        folder = Path(scratch.name)
        try:
            asyncio.run(_fetch_headers(wanted, folder))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise StartupError(
                f"{wanted.named} cannot be described in {folder}: {reason}; set TMPDIR to another"
            ) from error
        yield folder


async def _fetch_headers(wanted: _Wanted, folder: Path) -> None:
    async with wanted.client() as client:
        listing = await client.listing(may_be_served)
        for file in describing_texts(listing):
            _check_sizes(wanted, [file])
            text = await client.read(file, 0, file.size, commit=listing.commit)
            (folder / file.name).parent.mkdir(exist_ok=True)
            (folder / file.name).write_bytes(text)
        weights = served_weights(listing, folder, named=wanted.named)
        await write_headers(client, weights, listing.commit, folder, named=wanted.named)


def _without_a_call(wanted: _Wanted) -> Path | None:
    """The folder in the cache, if no call to the hub is needed or allowed; else None.

    Raises StartupError where the hub may not be called and the cache is not enough.
    """
    snapshot = _cached(wanted)
    if snapshot is None and constants.HF_HUB_OFFLINE:
        return _without_the_hub(wanted, "HF_HUB_OFFLINE is set")
    return snapshot


def _local_folder(name: str, revision: str | None, flag: str) -> Path | None:
    """`name` as a folder; None where it is a repository name. Raises StartupError otherwise."""
    named = f"{flag} {name}"
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if revision is not None:
            log.get_logger().warning("%s is a folder: --revision has no effect", named)
        try:
            refuse_lfs_pointers(Path(folder), named=named)
        except OSError as error:
            raise ConfigError(f"{named} cannot be read: {error.strerror}") from error
        return Path(folder)
    if os.path.exists(folder):
        raise ConfigError(f"{named} is a file; it must be a folder or a name on the hub")
    if name.startswith(("/", ".", "~")) or not REPO_ID.fullmatch(name):
        raise ConfigError(f"{named} is neither a folder nor a name on the hub")
    return None


def _wanted(
    name: str, revision: str | None, token: str | bool | None, download_dir: Path | None, *,
    flag: str, kind: Kind,
) -> _Wanted:  # fmt: skip
    if revision is not None and not REVISION.fullmatch(revision):
        raise ConfigError(f"--revision {revision!r} is no branch, tag or commit")
    root = (download_dir or Path(constants.HF_HUB_CACHE)).expanduser()
    return _Wanted(
        repo=name,
        revision=revision or "main",
        named=f"{flag} {name}",
        token=token,
        cache=RepoCache(root, name),
        kind=kind,
    )


def _cached(wanted: _Wanted) -> Path | None:
    """The folder that an earlier start has fetched completely; None where there is none."""
    commit = wanted.cache.commit_of(wanted.revision)
    if commit is None:
        return None
    # A complete "model" includes all files of "texts".
    kinds = {wanted.kind} | ({"model"} if wanted.kind == "texts" else set())
    if not any(wanted.cache.is_whole(commit, kind) for kind in kinds):
        return None
    log.get_logger().info(
        "%s: commit %s from the cache, the hub is not asked (hf download %s %s looks for "
        "a newer one)",
        wanted.named, commit[:12], wanted.repo,
        ADAPTER_TEXT if wanted.kind == "adapter" else "config.json",
    )  # fmt: skip
    return wanted.cache.snapshot(commit)


async def _list(wanted: _Wanted) -> Listing:
    async with wanted.client() as client:
        return await client.listing(may_be_served)


def _all_there(wanted: _Wanted, listing: Listing) -> Path | None:
    """The folder, if all wanted files of the listed commit are in the cache already; else None.

    Another tool may have fetched them. This works in a read-only cache, too.
    """
    cache, commit = wanted.cache, listing.commit
    texts = served_texts(listing, wanted.kind)
    if not all(cache.has(commit, file) for file in texts):
        return None
    snapshot = cache.snapshot(commit)
    weights = served_weights(listing, snapshot, named=wanted.named, kind=wanted.kind)
    if not all(cache.has(commit, file) for file in weights):
        return None
    cache.note_whole(wanted.revision, commit, wanted.kind, texts + weights)
    return snapshot


def _without_the_hub(wanted: _Wanted, reason: str) -> Path:
    """The folder in the cache as it is, with a warning that gives `reason`.

    Raises StartupError where it lacks files that a start needs.
    """
    snapshot = _served_as_it_is(wanted)
    if snapshot is not None:
        log.get_logger().warning(
            "%s: serving commit %s from the cache as it is: %s",
            wanted.named, snapshot.name[:12], reason,
        )  # fmt: skip
        return snapshot
    raise StartupError(
        f"{wanted.named} is not a folder, not whole in the cache {wanted.cache.root}, and {reason}"
    )


def _served_as_it_is(wanted: _Wanted) -> Path | None:
    """The folder of the commit that was last seen, if it seems to have all that a start needs."""
    commit = wanted.cache.commit_of(wanted.revision)
    if commit is None:
        return None
    snapshot = wanted.cache.snapshot(commit)
    return snapshot if looks_whole(snapshot, wanted.kind) else None


async def _fetch(wanted: _Wanted, listing: Listing, progress: Progress, check: Check) -> Path:
    """Fetch all wanted files of the listing that are missing; returns the snapshot folder."""
    cache, commit = wanted.cache, listing.commit
    snapshot = cache.snapshot(commit)
    async with wanted.client() as client:
        download = Download(client, named=wanted.named, commit=commit, progress=progress)
        texts = served_texts(listing, wanted.kind)
        _check_sizes(wanted, texts)
        weights = likely_weights(listing, wanted.kind)
        missing = _missing(cache, commit, texts)
        num_bytes = sum(part.missing_bytes for part in _missing(cache, commit, texts + weights))
        _check_disk(wanted, num_bytes)
        download.expect(num_bytes)
        await download.run(missing)
        for file in texts:
            cache.link(commit, file)
        weights = served_weights(listing, snapshot, named=wanted.named, kind=wanted.kind)
        if weights:
            await _fetch_weights(wanted, client, download, weights, commit=commit, check=check)
    cache.note_whole(wanted.revision, commit, wanted.kind, texts + weights)
    return snapshot


async def _fetch_weights(
    wanted: _Wanted, client: HubClient, download: Download, weights: list[RemoteFile], *,
    commit: str, check: Check,
) -> None:  # fmt: skip
    cache = wanted.cache
    missing = _missing(cache, commit, weights)
    cache.drop_partials(keep={partial.file.etag for partial in missing})
    num_bytes = sum(part.missing_bytes for part in missing)
    download.expect(download.done + num_bytes)
    if missing:
        _check_disk(wanted, num_bytes)
        await _check_headers(wanted, client, weights, commit=commit, check=check)
        total = sum(file.size for file in weights)
        log.get_logger().info(
            "download: %s of %s at commit %s into %s%s",
            size_text(num_bytes), wanted.repo, commit[:12], cache.root,
            f", {size_text(total - num_bytes)} are there" if num_bytes < total else "",
        )  # fmt: skip
        began_s = time.monotonic()
        await download.run(missing)
        took_s = max(time.monotonic() - began_s, 1e-9)
        log.get_logger().info(
            "downloaded %s in %.1f s (%s/s)",
            size_text(num_bytes), took_s, size_text(num_bytes / took_s),
        )  # fmt: skip
    for file in weights:
        cache.link(commit, file)


async def _check_headers(
    wanted: _Wanted, client: HubClient, weights: list[RemoteFile], *, commit: str, check: Check
) -> None:
    """Call `check` with config.json and the headers of the weights, before these are fetched."""
    # The temporary folder is in the cache, which is writable here; /tmp may be small or read-only.
    with tempfile.TemporaryDirectory(prefix="pyserve-", dir=wanted.cache.locks) as name:
        folder, snapshot = Path(name), wanted.cache.snapshot(commit)
        for text in (*snapshot.iterdir(), *snapshot.glob("*/config.json")):
            if text.is_file() and not text.name.endswith(".safetensors"):
                place = folder / text.relative_to(snapshot)
                place.parent.mkdir(exist_ok=True)
                place.symlink_to(text.resolve())
        await write_headers(client, weights, commit, folder, named=wanted.named)
        try:
            check(folder)
        except StartupError as error:
            line = str(error).replace(f"{folder}/", "").replace(str(folder), wanted.named)
            raise type(error)(line) from error


def _check_sizes(wanted: _Wanted, texts: list[RemoteFile]) -> None:
    """Raise CheckpointError where the files are too large, as they will be read into memory."""
    for file in texts:
        if file.size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{wanted.named}: {file.name} has {file.size} bytes, the limit is {MAX_TEXT_BYTES}"
            )
    num_bytes = sum(file.size for file in texts)
    if num_bytes > MAX_TEXTS_BYTES:
        raise CheckpointError(
            f"{wanted.named}: its {len(texts)} files beside the weights have {num_bytes} bytes, "
            f"the limit is {MAX_TEXTS_BYTES}"
        )


def _missing(cache: RepoCache, commit: str, files: list[RemoteFile]) -> list[PartialFile]:
    """The blobs of `files` that have to be fetched; files with equal contents share one."""
    missing = {
        file.etag: file
        for file in files
        if not cache.has(commit, file) and not cache.has_blob(file)
    }
    return [PartialFile(cache.blob(etag), file) for etag, file in missing.items()]


def _check_disk(wanted: _Wanted, num_bytes: int) -> None:
    """Raise StartupError where the disk has no room for `num_bytes` and DISK_MARGIN_BYTES."""
    if not num_bytes:
        return
    folder = wanted.cache.root
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < num_bytes + DISK_MARGIN_BYTES:
        raise StartupError(
            f"{wanted.named} needs {size_text(num_bytes + DISK_MARGIN_BYTES)} in {folder}, and "
            f"{size_text(free_bytes)} are free there: make room, or name a folder on another disk "
            f"with --download-dir"
        )


def _disk_error(wanted: _Wanted, error: OSError) -> StartupError:
    reason = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += "; make room and start again, what has arrived is not fetched twice"
    return StartupError(
        f"{wanted.named} cannot be kept in {wanted.cache.root}: {reason}; another folder can be "
        f"named with --download-dir"
    )
