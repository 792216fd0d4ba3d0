"""Adapters by name: what is served, and the versions of it that lie in the host's memory.

What is loaded under a name is a version; loading the name again makes another one. A request holds
the version that it began with until it ends, whatever is loaded or unloaded meanwhile, so that none
ever mixes two. The host's memory has room for `limit` versions: one that nobody holds gives way,
the one that was used longest ago first, and is read again, as a new version, when its name is asked
for. Where all are held, what asks for another waits, and nobody passes it.

Everything here runs on the event loop, but files are read on a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
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
    """A name that is served. `adapter` is None where it is to be read when it is asked for."""

    name: str
    root: str
    path: Path  # of the folder
    adapter: Adapter | None = None


class HostAdapters:
    """Implements client.AdapterStore.

    read         a folder -> its adapter. Raises CheckpointError.
    find         a name -> the folder that it means, maybe downloaded. Raises StartupError.
    limit        versions in the host's memory, and one more while a name is loaded again.
    folder       whose folders are adapters too, served by their names when they are asked for.
    max_waiting  requests that may wait for room.
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
        self._kept: OrderedDict[int, Adapter] = OrderedDict()  # the least recently used first
        self._num_holders: Counter[int] = Counter()  # by version
        self._replaced: set[int] = set()  # versions that go as soon as nobody holds them
        self._finding = asyncio.Lock()  # one download at a time, beside which others are loaded
        self._loading = asyncio.Lock()  # one at a time, in the order in which they were asked for
        self._is_short = False  # somebody waits until a version is not held any more
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
        """As `load`, before the loop runs. Raises StartupError."""
        _check_name(name)
        path = self._find_folder(root)
        weights = self._read_folder(path)
        self._make_way(self._limit)
        self._put(_Entry(name, root, path), weights)

    async def load(self, name: str, root: str, *, is_reload: bool = False) -> None:
        _check_name(name)
        self._check_free(name, is_reload)
        async with self._finding:
            path = await asyncio.to_thread(self._find_folder, root)
        async with self._loading:
            self._check_free(name, is_reload)
            before = self._entries.get(name)
            is_kept = before is not None and before.adapter is not None
            # What it replaces stays until it is there, beyond the limit.
            weights = await self._read(path, self._limit + is_kept)
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
        """The present version of a name. The caller has _loading."""
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
        """Makes room for it first among `limit` versions. The caller has _loading."""
        try:
            while not self._make_way(limit):
                self._is_short = True
                self._released.clear()
                await self._released.wait()
        finally:
            self._is_short = False
        return await asyncio.to_thread(self._read_folder, path)

    def _make_way(self, limit: int) -> bool:
        """Whether there is room for one more of `limit`, once those have gone that nobody holds."""
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
        """The version of an entry that is served no more goes, at once or when nobody holds it."""
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
        """The folder of an adapter that is served by its name alone."""
        if self._folder is None or not _FOLDER_NAME.fullmatch(name):
            return None
        path = self._folder / name
        return path if os.path.isfile(path / CONFIG_FILE) else None


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequestError(
            f"lora_name must be 1 to {MAX_NAME_CHARS} printable characters, got {name[:100]!r}",
            "lora_name",
        )
