"""From a model's name to a local folder: a folder as it is, anything else from the hub.

Only what is served is fetched, all of one commit: config, tokenizer and safetensors files; no code,
no pickles, no second format. What is whole in the cache is served without a call to the hub; a
branch then stays at the commit it was fetched at, until the cache's ref moves on. Imports no torch.
"""

from __future__ import annotations

import asyncio
import codecs
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec
from huggingface_hub import constants, get_token

from pyserve import __version__, log
from pyserve.errors import CheckpointError, ConfigError, StartupError
from pyserve.model.checkpoint_files import (
    INDEX_FILE,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
)
from pyserve.model.download import Download, PartialFile, Progress, size_text
from pyserve.model.hub_cache import RepoCache
from pyserve.model.hub_client import HubClient, Listing, RemoteFile, UnreachableError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
REVISION = re.compile(r"(?!.*\.\.)[\w][\w./+-]{0,199}")
TOKEN = re.compile(r"[!-~]{1,4096}")
DEFAULT_REVISION = "main"

TEXTS = (
    "config.json", "generation_config.json", "tokenizer*.json", "*.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MORE_TEMPLATES = re.compile(r"additional_chat_templates/[\w-][\w.-]*\.jinja")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one makes a tokenizer

MAX_TEXT_BYTES = 128 * 2**20
FIRST_BYTES = 64 * 1024  # most headers are shorter
DISK_MARGIN_BYTES = 256 * 2**20  # left for logs, compiled products and the file system itself

Check = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One repository at one revision."""

    repo: str
    revision: str
    named: str  # how messages call it
    token: str | bool | None  # True: the one that `hf auth login` has kept must be there
    cache: RepoCache
    with_weights: bool

    @property
    def kind(self) -> str:
        return "model" if self.with_weights else "texts"

    def client(self, revision: str) -> HubClient:
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
            self.repo, revision, named=self.named, endpoint=constants.ENDPOINT, headers=headers
        )


def resolve_model(
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    download_dir: Path | None,
    flag: str = "--model",
    with_weights: bool = True,
    progress: Progress = lambda done, total: None,
    check: Check = lambda folder: None,
) -> Path:
    """The folder of a model: `name` is a folder, or a repository of the hub, "owner/model".

    A repository is fetched into `download_dir`, or into the hub's own cache; what is there already
    is not fetched again.
    with_weights   false: config and tokenizer files alone.
    token          True: the one that `hf auth login` has kept; None: that one too, where it is.
    progress       bytes fetched, and of how many, on this thread.
    check          called before the first byte of weights is fetched, with a folder that holds
                   config.json and safetensors files of the right length without their data; what
                   it raises ends the download.
    Raises StartupError that names `flag`.
    """
    folder = _local_folder(name, revision, flag)
    if folder is not None:
        return folder
    wanted = _wanted(name, revision, token, download_dir, flag=flag, with_weights=with_weights)
    snapshot = _without_a_call(wanted)
    if snapshot is not None:
        return snapshot
    progress(0, 0)
    try:
        with wanted.cache.locked(wanted.named):
            return _cached(wanted) or asyncio.run(_fetch(wanted, progress, check))
    except UnreachableError as error:
        return _without_the_hub(wanted, str(error))
    except OSError as error:
        raise _disk_error(wanted, error) from error


def fetch_headers(
    name: str,
    folder: Path,
    *,
    revision: str | None,
    token: str | bool | None,
    download_dir: Path | None,
    flag: str = "--model",
) -> Path:
    """A folder with what describes a model: its own where it is on this machine, else `folder`,
    which gets config.json and safetensors files of the right length without their data.

    Raises StartupError that names `flag`.
    """
    local = _local_folder(name, revision, flag)
    if local is not None:
        return local
    wanted = _wanted(name, revision, token, download_dir, flag=flag, with_weights=True)
    snapshot = _without_a_call(wanted)
    if snapshot is not None:
        return snapshot

    async def fetch() -> None:
        async with wanted.client(wanted.revision) as client:
            listing = await client.listing()
            texts = [listing.files.get(name) for name in ("config.json", INDEX_FILE)]
            for file in filter(None, texts):
                _check_sizes(wanted, [file])
                text = await client.read(file, 0, file.size, commit=listing.commit)
                (folder / file.name).write_bytes(text)
            weights = _weights(wanted, listing, folder)
            await _write_headers(client, weights, listing.commit, folder)

    try:
        asyncio.run(fetch())
    except OSError as error:
        raise _disk_error(wanted, error) from error
    return folder


def _without_a_call(wanted: _Wanted) -> Path | None:
    """What the cache holds whole; None where the hub must, and may, be asked."""
    snapshot = _cached(wanted)
    if snapshot is None and constants.HF_HUB_OFFLINE:
        return _without_the_hub(wanted, "HF_HUB_OFFLINE is set")
    return snapshot


def _local_folder(name: str, revision: str | None, flag: str) -> Path | None:
    named = f"{flag} {name}"
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if revision is not None:
            log.get_logger().warning("%s is a folder: --revision has no effect", named)
        return Path(folder)
    if os.path.exists(folder):
        raise ConfigError(f"{named} is a file; it must be a folder or a name on the hub")
    if name.startswith(("/", ".", "~")) or not REPO_ID.fullmatch(name):
        raise ConfigError(f"{named} is neither a folder nor a name on the hub")
    return None


def _wanted(
    name: str, revision: str | None, token: str | bool | None, download_dir: Path | None, *,
    flag: str, with_weights: bool,
) -> _Wanted:  # fmt: skip
    if revision is not None and not REVISION.fullmatch(revision):
        raise ConfigError(f"--revision {revision!r} is no branch, tag or commit")
    root = (download_dir or Path(constants.HF_HUB_CACHE)).expanduser()
    return _Wanted(
        repo=name,
        revision=revision or DEFAULT_REVISION,
        named=f"{flag} {name}",
        token=token,
        cache=RepoCache(root, name),
        with_weights=with_weights,
    )


def _cached(wanted: _Wanted) -> Path | None:
    """The folder of what an earlier start has fetched whole; None where it has not."""
    commit = wanted.cache.commit_of(wanted.revision)
    if commit is None:
        return None
    # Whoever has the weights of a commit has its texts: they are fetched first.
    kinds = {wanted.kind, "model"}
    if not any(wanted.cache.is_whole(commit, kind) for kind in kinds):
        return None
    log.get_logger().info(
        "%s: commit %s from the cache, the hub is not asked (hf download %s config.json looks for "
        "a newer one)",
        wanted.named, commit[:12], wanted.repo,
    )  # fmt: skip
    return wanted.cache.snapshot(commit)


def _without_the_hub(wanted: _Wanted, reason: str) -> Path:
    """What another tool may have fetched. Raises StartupError where it is not enough."""
    commit = wanted.cache.commit_of(wanted.revision)
    if commit is not None and _looks_whole(wanted, wanted.cache.snapshot(commit)):
        log.get_logger().warning(
            "%s: serving commit %s from the cache as it is: %s", wanted.named, commit[:12], reason
        )
        return wanted.cache.snapshot(commit)
    raise StartupError(
        f"{wanted.named} is not a folder, not whole in the cache {wanted.cache.root}, and {reason}"
    )


def _looks_whole(wanted: _Wanted, snapshot: Path) -> bool:
    if not any((snapshot / name).is_file() for name in TOKENIZERS):
        return False
    if not wanted.with_weights:
        return True
    if not (snapshot / "config.json").is_file():
        return False
    if (snapshot / SINGLE_FILE).is_file():
        return True
    try:
        names = _indexed_files(snapshot / INDEX_FILE)
    except (OSError, CheckpointError):
        return False
    return all((snapshot / name).is_file() for name in names)


async def _fetch(wanted: _Wanted, progress: Progress, check: Check) -> Path:
    """All that is missing of the newest commit of the revision."""
    cache = wanted.cache
    async with wanted.client(wanted.revision) as client:
        listing = await client.listing()
        commit, snapshot = listing.commit, cache.snapshot(listing.commit)
        download = Download(client, named=wanted.named, commit=commit, progress=progress)
        texts = _texts(listing, with_weights=wanted.with_weights)
        _check_sizes(wanted, texts)
        weights = _likely_weights(listing) if wanted.with_weights else []
        missing = _missing(cache, commit, texts)
        download.expect(
            sum(part.missing_bytes for part in _missing(cache, commit, texts + weights))
        )
        await download.run(missing)
        for file in texts:
            _link(cache, commit, file)
        if wanted.with_weights:
            weights = _weights(wanted, listing, snapshot)
            await _fetch_weights(wanted, client, download, weights, commit=commit, check=check)
    cache.set_ref(wanted.revision, commit)
    cache.note_whole(commit, wanted.kind, texts + weights)
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
        _link(cache, commit, file)


async def _check_headers(
    wanted: _Wanted, client: HubClient, weights: list[RemoteFile], *, commit: str, check: Check
) -> None:
    """Let `check` see the model before it is here."""
    with tempfile.TemporaryDirectory(prefix="pyserve-") as name:
        folder, snapshot = Path(name), wanted.cache.snapshot(commit)
        for text in snapshot.iterdir():
            if text.is_file() and not text.name.endswith(".safetensors"):
                (folder / text.name).symlink_to(text.resolve())
        await _write_headers(client, weights, commit, folder)
        try:
            check(folder)
        except StartupError as error:
            line = str(error).replace(f"{folder}/", "").replace(str(folder), wanted.named)
            raise type(error)(line) from error


async def _write_headers(
    client: HubClient, weights: list[RemoteFile], commit: str, folder: Path
) -> None:
    """Safetensors files of the right length that hold their headers alone."""
    streams = asyncio.Semaphore(8)

    async def write(file: RemoteFile) -> None:
        async with streams:
            text = await client.read(file, 0, min(FIRST_BYTES, file.size), commit=commit)
            end = LENGTH_BYTES + int.from_bytes(text[:LENGTH_BYTES], "little")
            # What is too long is refused by who reads the file.
            if len(text) < end <= min(LENGTH_BYTES + MAX_HEADER_BYTES, file.size):
                text += await client.read(file, len(text), end, commit=commit)
        with (folder / file.name).open("wb") as sink:
            sink.write(text[:end])
            sink.truncate(file.size)

    await asyncio.gather(*[write(file) for file in weights])


def _texts(listing: Listing, *, with_weights: bool) -> list[RemoteFile]:
    """Everything but weights that is served from."""
    patterns = (*TEXTS, INDEX_FILE) if with_weights else TEXTS
    return [
        file
        for name, file in listing.files.items()
        if MORE_TEMPLATES.fullmatch(name)
        or ("/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns))
    ]


def _check_sizes(wanted: _Wanted, texts: list[RemoteFile]) -> None:
    """They are fetched before the disk is looked at."""
    for file in texts:
        if file.size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{wanted.named}: {file.name} has {file.size} bytes, the limit is {MAX_TEXT_BYTES}"
            )


def _likely_weights(listing: Listing) -> list[RemoteFile]:
    """Before the index is here: what it will name."""
    if SINGLE_FILE in listing.files:
        return [listing.files[SINGLE_FILE]]
    return [
        file
        for name, file in listing.files.items()
        if fnmatchcase(name, "model*.safetensors") and "/" not in name
    ]


def _weights(wanted: _Wanted, listing: Listing, folder: Path) -> list[RemoteFile]:
    """The safetensors files the loader will read; the index lies in `folder`."""
    if SINGLE_FILE in listing.files:
        return [listing.files[SINGLE_FILE]]
    if INDEX_FILE not in listing.files:
        others = {Path(name).suffix for name in listing.files} & {".bin", ".pth", ".pt", ".gguf"}
        has = f", only {' and '.join(sorted(others))}" if others else ""
        raise CheckpointError(
            f"{wanted.named} has no weights as safetensors ({SINGLE_FILE} or {INDEX_FILE}){has}"
        )
    names = _indexed_files(folder / INDEX_FILE)
    lacking = [name for name in names if name not in listing.files]
    if lacking:
        raise CheckpointError(
            f"{wanted.named}: {INDEX_FILE} lists {lacking[0][:200]}, which is not there"
        )
    return [listing.files[name] for name in names]


def _indexed_files(path: Path) -> list[str]:
    """Names of the files an index lists: of the same folder, as nothing else is fetched."""

    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    with path.open("rb") as file:
        text = file.read(MAX_INDEX_BYTES + 1).removeprefix(codecs.BOM_UTF8)
    try:
        names = set(msgspec.json.decode(text[:MAX_INDEX_BYTES], type=Index).weight_map.values())
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{INDEX_FILE} is no index of weights") from error
    if not names or any("/" in name or not name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{INDEX_FILE} must list safetensors files of the same folder")
    return sorted(names)


def _missing(cache: RepoCache, commit: str, files: list[RemoteFile]) -> list[PartialFile]:
    """What has to be fetched of `files`, contents that occur twice only once."""
    missing = {
        file.etag: file
        for file in files
        if not cache.has(commit, file) and not cache.has_blob(file)
    }
    return [PartialFile(cache.blob(etag), file) for etag, file in missing.items()]


def _link(cache: RepoCache, commit: str, file: RemoteFile) -> None:
    if not cache.has(commit, file):
        cache.link(commit, file)


def _check_disk(wanted: _Wanted, num_bytes: int) -> None:
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
    return StartupError(
        f"{wanted.named} cannot be kept in {wanted.cache.root}: {reason}; another folder can be "
        f"named with --download-dir"
    )
