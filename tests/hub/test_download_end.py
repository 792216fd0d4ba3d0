"""How a download ends that cannot go on: its reason is told, no file is closed under a thread."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyserve.hub import download
from pyserve.hub.client import RemoteFile
from pyserve.hub.download import Download, PartialFile
from tests.waiting import until

DATA = b"x" * 1000


def test_a_file_that_gets_its_name_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for one file while the checksum of another is taken on a thread."""
    has_begun = threading.Event()
    digest = download._digest

    def slow_digest(fd: int, file: RemoteFile) -> str:
        has_begun.set()
        time.sleep(0.2)
        return digest(fd, file)

    class Client:
        async def fetch(
            self, file: RemoteFile, start: int, end: int, *, commit: str,
            write: Callable[[int, bytes], None],
        ) -> None:  # fmt: skip
            if file.name == "whole":
                write(0, DATA)
                return
            await until(has_begun.is_set)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def partial(name: str) -> PartialFile:
        file = RemoteFile(name, len(DATA), hashlib.sha256(DATA).hexdigest())
        return PartialFile(tmp_path / name, file)

    monkeypatch.setattr(download, "_digest", slow_digest)
    client: Any = Client()
    running = Download(client, named="x", commit="", progress=lambda done, total: None)
    with pytest.raises(OSError) as error:
        asyncio.run(running.run([partial("whole"), partial("other")]))
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert (tmp_path / "whole").read_bytes() == DATA
