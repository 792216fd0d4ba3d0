"""Who could change what we would load: owners, modes and links along the path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyserve.ops import build_cache


def test_a_folder_of_ours_is_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert build_cache.untrusted_reason(folder) is None, "what is not there yet is made by us"
    umask = os.umask(0)
    try:
        build_cache.make_folder(folder)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
    assert build_cache.untrusted_reason(folder) is None
    build_cache.make_folder(folder)  # harmless again


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(OSError):
        build_cache.make_folder(tmp_path / "a" / "b")
    with pytest.raises(FileExistsError):
        build_cache.make_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("mode", "is_above", "reason"),
    [
        (0o755, True, None),
        (0o1777, True, None),  # as /tmp
        (0o1777, False, "everybody can write to"),  # others could add files to it
        (0o757, True, "everybody can write to"),
        (0o775, True, "the group 4321 can write to"),
        (0o1775, True, None),
    ],
)
def test_modes(tmp_path: Path, mode: int, is_above: bool, reason: str | None) -> None:
    if os.geteuid() != 0 and mode & 0o020:
        pytest.skip("only root can give a folder to another group")
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True, mode=0o700)
    if mode & 0o020:
        os.chown(folder, -1, 4321)
    folder.chmod(mode)
    found = build_cache.untrusted_reason(folder / "below" if is_above else folder)
    assert found == (reason and f"{reason} {folder}")


def test_owners_in_a_user_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the real root is shown as nobody, whom no process beside us can be."""
    uid_map, overflow = tmp_path / "map", tmp_path / "overflow"
    monkeypatch.setattr(build_cache, "_UID_MAP", uid_map)
    monkeypatch.setattr(build_cache, "_OVERFLOW_UID", overflow)
    overflow.write_text("65534\n")
    uid_map.write_text("         0          0 4294967295\n")
    assert build_cache._trusted_owners() == {0, os.geteuid()}
    uid_map.write_text("         0       1000          1\n")
    assert build_cache._trusted_owners() == {0, os.geteuid(), 65534}
