"""HostAdapters: the adapters that are served by name, and their weights in host memory.

Each load of a name makes a new version of the adapter. A request holds the version that it started
with until it ends, whatever is loaded or unloaded meanwhile, so no request ever mixes two versions.
Host memory has room for `limit` versions. When it is full, the least recently used version that no
request holds is dropped; when its name is requested again, it is read from disk as a new version.
If requests hold all versions, a request for another adapter waits, and later ones queue behind it.

Everything here runs on the event loop, except that files are read on a worker thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from pyserve import log
from pyserve.client import Adapter, ServedAdapter
from pyserve.errors import (
    CheckpointError,
    EngineError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
)
from pyserve.model.adapter_config import CONFIG_FILE
from pyserve.model.adapter_weights import AdapterWeights
from pyserve.words import counted

MAX_NAME_CHARS = 256
_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,127}", re.ASCII)


@dataclass(slots=True, eq=False)
class _Entry:
    """A served name. `adapter` is None while its weights are not in host memory: the next request
    for the name reads them again."""

    name: str
    root: str
    path: Path  # folder that holds the adapter's files
    adapter: Adapter | None = None


class HostAdapters:
    """Implements client.AdapterStore.

    read         reads the weights from an adapter's folder. Raises CheckpointError.
    find         turns a path or hub repository into a local folder, downloading it if needed.
                 Raises StartupError.
    limit        maximum number of versions in host memory; reloading a name in place may exceed it
                 by one.
    folder       each subfolder of it is served under its own name, and read when first requested.
    max_waiting  maximum number of requests that wait for host memory or a load.
    """

    def __init__(
        self, read: Callable[[Path], AdapterWeights], *, limit: int, folder: Path | None = None,
        max_waiting: int = 1024, find: Callable[[str], Path] = Path,
    ) -> None:  # fmt: skip
        self.num_loads = 0
        self._read_folder = read
        self._find_folder = find
        self._limit = limit
        self._folder = folder
        self._max_waiting = max_waiting
        self._entries: dict[str, _Entry] = {}
        self._versions = itertools.count(1)
        self._kept: OrderedDict[int, Adapter] = OrderedDict()  # by version, least recent first
        self._num_holders: Counter[int] = Counter()  # version -> requests that hold it
        self._replaced: set[int] = set()  # versions to drop as soon as no request holds them
        self._finding = asyncio.Lock()  # one download at a time; it does not block other loads
        self._loading = asyncio.Lock()  # one load at a time; asyncio.Lock serves waiters in order
        self._is_short = False  # a load waits until some version is released
        self._released = asyncio.Event()
        self._num_waiting = 0

    @property
    def served(self) -> list[ServedAdapter]:
        return [ServedAdapter(entry.name, entry.root) for entry in self._entries.values()]

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def has(self, name: str) -> bool:
        return name in self._entries or self._in_folder(name) is not None

    def load_at_start(self, name: str, root: str) -> None:
        """Like `load`, but before the event loop runs. Raises StartupError."""
        _check_name(name)
        path = self._find_folder(root)
        weights = self._read_folder(path)
        self._make_way(self._limit)
        self._put(_Entry(name, root, path), weights)

    async def load(self, name: str, root: str, *, is_reload: bool = False) -> None:
        _check_name(name)
        self._check_free(name, is_reload)
        path = await self._found(root)
        async with self._loading:
            self._check_free(name, is_reload)
            before = self._entries.get(name)
            is_kept = before is not None and before.adapter is not None
            # The version that is replaced stays until the new one has been read, so that a failed
            # load changes nothing. Meanwhile there may be one version more than the limit.
            try:
                weights = await self._read(path, self._limit + is_kept)
            except CheckpointError as error:
                raise CheckpointError(_without_place(str(error), path)) from error
            if (before := self._entries.get(name)) is not None:
                self._replace(before)
            self._put(_Entry(name, root, path), weights)

    def unload(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            raise NotFoundError(f"The adapter `{name[:200]}` is not loaded.", "lora_name")
        self._replace(entry)

    async def acquire(self, name: str) -> Adapter:
        entry = self._entries.get(name)
        if entry is not None and entry.adapter is not None and not self._is_short:
            return self._hold(entry.adapter)
        if self._num_waiting >= self._max_waiting:
            raise QueueFullError(
                f"{counted(self._num_waiting, 'request')} wait for room for their adapters already"
            )
        self._num_waiting += 1
        try:
            async with self._loading:
                return self._hold(await self._wanted(name))
        finally:
            self._num_waiting -= 1

    def release(self, adapter: Adapter) -> None:
        version = adapter.version
        self._num_holders[version] -= 1
        if self._num_holders[version]:
            return
        del self._num_holders[version]
        if version in self._replaced:
            self._drop(version)
        self._released.set()

    def check_invariants(self) -> None:
        """Assert that all books agree. For tests."""
        assert len(self._kept) <= self._limit + 1, "more versions than there is room for"
        assert all(count > 0 for count in self._num_holders.values())
        assert self._num_holders.keys() <= self._kept.keys(), "a version that is held is gone"
        assert self._replaced <= self._num_holders.keys(), "a replaced version stays for nobody"
        shown = {it.adapter.version for it in self._entries.values() if it.adapter is not None}
        assert shown == self._kept.keys() - self._replaced

    async def _found(self, root: str) -> Path:
        is_here = os.path.isdir(os.path.expanduser(root))  # it need not wait for a download
        async with nullcontext() if is_here else self._finding:
            folder = await asyncio.to_thread(self._find_folder, root)
        return folder.absolute()

    def _check_free(self, name: str, is_reload: bool) -> None:
        if name in self._entries and not is_reload:
            raise InvalidRequestError(
                f"the adapter `{name}` has already been loaded; to load it again in its place, "
                "set load_inplace to true",
                "lora_name",
            )

    def _hold(self, adapter: Adapter) -> Adapter:
        self._num_holders[adapter.version] += 1
        self._kept.move_to_end(adapter.version)
        return adapter

    async def _wanted(self, name: str) -> Adapter:
        """The current version of `name`, read first if needed. The caller holds `_loading`.

        Raises NotFoundError for an unknown name, EngineError where its files cannot be read.
        """
        served = self._entries.get(name)
        path = self._in_folder(name) if served is None else served.path
        if path is None:
            raise NotFoundError(f"The model `{name[:200]}` does not exist.", "model")
        if served is not None and served.adapter is not None:
            return served.adapter
        try:
            weights = await self._read(path, self._limit)
        except CheckpointError as error:
            log.get_logger().error("the adapter %s cannot be loaded: %s", name, error)
            raise EngineError(f"the adapter `{name[:200]}` cannot be loaded any more") from error
        if self._entries.get(name) is not served:  # unloaded meanwhile
            raise NotFoundError(f"The model `{name[:200]}` does not exist.", "model")
        return self._put(served or _Entry(name, str(path), path), weights)

    async def _read(self, path: Path, limit: int) -> AdapterWeights:
        """Wait for room for one more version, then read it on a worker thread.

        The caller holds `_loading`. Raises CheckpointError.
        """
        try:
            while not self._make_way(limit):
                self._is_short = True
                self._released.clear()
                await self._released.wait()
        finally:
            self._is_short = False
        return await asyncio.to_thread(self._read_folder, path)

    def _make_way(self, limit: int) -> bool:
        """Drop unheld versions until `limit` has room for one more; False where all are held."""
        while len(self._kept) >= limit:
            version = next((it for it in self._kept if not self._num_holders[it]), None)
            if version is None:
                return False
            for entry in self._entries.values():
                if entry.adapter is not None and entry.adapter.version == version:
                    entry.adapter = None
            self._drop(version)
        return True

    def _put(self, entry: _Entry, weights: AdapterWeights) -> Adapter:
        adapter = Adapter(entry.name, next(self._versions), weights)
        entry.adapter = self._kept[adapter.version] = adapter
        self._entries[entry.name] = entry
        self.num_loads += 1
        return adapter

    def _replace(self, entry: _Entry) -> None:
        """Drop the version of an entry that is no longer served, once no request holds it."""
        if entry.adapter is None:
            return
        version, entry.adapter = entry.adapter.version, None
        if self._num_holders[version]:
            self._replaced.add(version)
        else:
            self._drop(version)
            self._released.set()

    def _drop(self, version: int) -> None:
        self._num_holders.pop(version, None)
        self._replaced.discard(version)
        del self._kept[version]

    def _in_folder(self, name: str) -> Path | None:
        """The subfolder of `folder` that holds the adapter `name`; None where there is none."""
        if self._folder is None or not _FOLDER_NAME.fullmatch(name):
            return None
        path = self._folder / name
        return path if os.path.isfile(path / CONFIG_FILE) else None


def _without_place(message: str, folder: Path) -> str:
    """Which file of a folder is meant, not where it lies."""
    return message.replace(f"{folder}/", "").replace(f"{folder}", "the folder")


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequestError(
            f"lora_name must be 1 to {MAX_NAME_CHARS} printable characters, got {name[:100]!r}",
            "lora_name",
        )
