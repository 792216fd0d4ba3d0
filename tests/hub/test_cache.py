"""A cache that nobody can write: what is in it is served, and nothing is tried in vain."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import StartupError
from pyserve.hub.resolve import model_headers, resolve_model
from tests.hub.hub_stub import CDN, REPO, WEIGHTS, HubStub
from tests.read_only import read_only

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 100.0  # for what takes a second


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetch(cache: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {"revision": None, "token": None, "download_dir": cache}
    return resolve_model(REPO, **(defaults | options))


def forget_notes(cache: Path) -> None:
    """As another tool would have fetched it."""
    shutil.rmtree(cache / "models--org--name" / ".pyserve")
    shutil.rmtree(cache / ".locks")


def test_what_we_have_fetched_is_served_without_a_try_to_write(stub: HubStub, cache: Path) -> None:
    folder = fetch(cache)
    stub.close()
    with read_only(cache) as tried:
        assert fetch(cache) == folder
        assert fetch(cache, has_weights=False) == folder
        with model_headers(REPO, revision=None, token=None, download_dir=cache) as found:
            assert found == folder
    assert tried == []


@pytest.mark.parametrize("revision", [None, "0123456789abcdef0123456789abcdef01234567"])
def test_what_another_tool_has_fetched_is_served_from_a_cache_that_is_only_read(
    stub: HubStub, cache: Path, revision: str | None
) -> None:
    folder = fetch(cache)
    forget_notes(cache)
    stub.seen.clear()
    with read_only(cache) as tried:
        assert fetch(cache, revision=revision) == folder
    assert len(stub.seen) == 1 and stub.sent(CDN) == 0, "the list alone"
    assert [line.split()[0] for line in tried] == ["os.mkdir"], "of the note, which is not needed"
    assert not (cache / ".locks").exists()
    assert fetch(cache) == folder
    stub.close()
    assert fetch(cache) == folder, "noted when the cache could be written again"


def test_a_newer_commit_that_cannot_be_kept(
    stub: HubStub, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch(cache)
    forget_notes(cache)
    stub.commit = "f" * 40
    stub.repos[REPO]["config.json"] = b'{"model_type": "y"}'
    with read_only(cache):
        assert fetch(cache) == folder
    assert "serving commit 0123456789ab from the cache as it is: the newest" in caplog.text
    assert "Read-only file system" in caplog.text and stub.sent("/resolve/") > 0
    assert fetch(cache).name == stub.commit


def test_what_is_not_whole_in_a_cache_that_is_only_read(stub: HubStub, cache: Path) -> None:
    folder = fetch(cache)
    (folder / WEIGHTS).unlink()
    cache_with_nothing = cache.with_name("empty")
    cache_with_nothing.mkdir()
    for found in (cache, cache_with_nothing):
        with read_only(found), pytest.raises(StartupError) as refusal:
            fetch(found)
        line = str(refusal.value)
        assert f"--model {REPO} cannot be kept in {found}: Read-only file system" in line
        assert "--download-dir" in line


def test_the_only_folder_that_is_written_is_the_cache(
    stub: HubStub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose root is read-only: there is no /tmp."""
    monkeypatch.setattr("tempfile.tempdir", str(cache / "there is no such"))
    seen: list[Path] = []
    folder = fetch(cache, check=seen.append)
    assert seen and (folder / WEIGHTS).is_file()
    assert list((cache / ".locks" / "models--org--name").iterdir()) == [
        cache / ".locks" / "models--org--name" / "pyserve.lock"
    ]
    no_cache = cache.with_name("2")
    with pytest.raises(StartupError, match="set TMPDIR"):
        with model_headers(REPO, revision=None, token=None, download_dir=no_cache):
            pass


MOUNTED = """
import sys
from pathlib import Path
from pyserve.hub import resolve
cache = Path(sys.argv[1])
print(resolve.resolve_model("org/name", revision=None, token=None, download_dir=cache))
try:
    (cache / "x").touch()
except OSError as error:
    print(error.strerror)
"""


def test_a_file_system_that_is_mounted_read_only(stub: HubStub, cache: Path) -> None:
    """The system's own word for it, where this user may mount."""
    folder = fetch(cache)
    forget_notes(cache)
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    able = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", cache], capture_output=True, timeout=TIMEOUT_S
    )
    if able.returncode != 0:
        pytest.skip("no right to mount")
    run = f'{mount} && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", run, "sh", str(cache), sys.executable, MOUNTED],
        cwd=ROOT, env={**os.environ, "HF_ENDPOINT": stub.endpoint, "HF_HUB_OFFLINE": "0"},
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(folder), "Read-only file system"], done.stderr
