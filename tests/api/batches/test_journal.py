"""The journal: what a kill, a full disk or a second process leaves of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyserve.api.batches.journal import Journal, JournalError, has_failed


def opened(path: Path, num_lines: int = 4, digest: str = "d") -> Journal:
    return Journal(path, input_digest=digest, num_lines=num_lines)


def good(number: int) -> bytes:
    return b'{"custom_id":"%d","error":null}\n' % number


def test_a_cut_anywhere_leaves_the_lines_before_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = opened(path)
    for number in (2, 0, 3):
        journal.put(number, good(number), has_failed=False)
    journal.close()
    whole = path.read_bytes()
    for size in (*range(0, len(whole), 7), len(whole)):
        path.write_bytes(whole[:size])
        journal = opened(path)
        num_whole = max(whole[:size].count(b"\n") - 1, 0)
        assert journal.num_done == num_whole
        assert [n for n in range(4) if journal.is_done(n)] == sorted([2, 0, 3][:num_whole])
        for number in range(4):
            if not journal.is_done(number):
                journal.put(number, good(number), has_failed=False)
        journal.sync()
        assert journal.copy(tmp_path / "out") == 4
        journal.close()
        assert (tmp_path / "out").read_bytes() == b"".join(map(good, range(4)))


def test_failures_are_counted_again(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    journal.put(0, b'{"error":{"message":"x"}}\n', has_failed=True)
    journal.put(1, good(1), has_failed=False)
    journal.close()
    journal = opened(tmp_path / "j")
    assert (journal.num_done, journal.num_failed) == (2, 1)
    assert journal.copy(tmp_path / "bad", has_failed) == 1
    journal.close()


def test_a_full_disk_keeps_no_half_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path / "j")
    journal.put(0, good(0), has_failed=False)
    whole = (tmp_path / "j").read_bytes()
    write = os.pwrite

    def full(file: int, data: bytes, offset: int) -> int:
        if len(data) < 12:
            raise OSError(errno.ENOSPC, "full")
        return write(file, data[:10], offset)

    monkeypatch.setattr("pyserve.api.batches.journal.os.pwrite", full)
    with pytest.raises(JournalError, match="j: No space left on device"):
        journal.put(1, good(1), has_failed=False)
    monkeypatch.undo()
    assert (tmp_path / "j").read_bytes() == whole and not journal.is_done(1)
    journal.put(1, good(1), has_failed=False)
    monkeypatch.setattr("pyserve.api.batches.journal.os.fsync", lambda file: full(file, b"", 0))
    with pytest.raises(JournalError, match="out: No space left"):
        journal.copy(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["j"]
    journal.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = opened(tmp_path / "j")
    with pytest.raises(JournalError, match="another process writes it"):
        opened(tmp_path / "j")
    journal.close()
    opened(tmp_path / "j").close()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello\n", "no file of a batch"),
        (b'{"journal":1,"input":"e","num_lines":4}\n', "another input of 4 lines"),
        (b'{"journal":1,"input":"d","num_lines":4}\nabc\n', "the line at byte 40 is no answer"),
        (b'{"journal":1,"input":"d","num_lines":4}\n9\t{}\n', "the line at byte 40 is no answer"),
    ],
)
def test_files_that_are_none_of_it_are_left_alone(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalError, match=words):
        opened(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == content


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="No such file or directory"):
        opened(tmp_path / "no" / "j")
