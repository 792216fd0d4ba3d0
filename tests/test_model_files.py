from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyserve.errors import CheckpointError, ConfigError
from pyserve.model_files import (
    MAX_OBJECT_BYTES,
    decode_object,
    guarded,
    read_bytes,
    read_list,
    read_object,
    read_text,
)


class PanicException(BaseException):
    """What a panic of a library in Rust is to Python."""


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    for read in (read_bytes, read_text, read_object):
        assert read(tmp_path / "no" / "file.json") is None


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(CheckpointError, match=f"{path}: .*not a regular file"):
            read_bytes(path)


def test_a_link_to_nothing_is_no_missing_file(tmp_path: Path) -> None:
    (tmp_path / "gone.json").symlink_to("../blobs/cleaned")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name, says in (("gone", "is a link to a file that is gone"), ("loop", "cannot be read")):
        for read in (read_bytes, read_text, read_object):
            with pytest.raises(CheckpointError, match=f"{name}.json: {says}"):
                read(tmp_path / f"{name}.json")


def test_an_object_has_a_lower_limit_than_a_text(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b"{}")
    os.truncate(path, MAX_OBJECT_BYTES + 1)
    assert len(read_text(path) or "") == MAX_OBJECT_BYTES + 1
    for read in (read_object, read_list):
        with pytest.raises(CheckpointError, match=f"f.json: has .*the limit is {MAX_OBJECT_BYTES}"):
            read(path)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 5000, "a\0b", "\ud800"])
def test_a_name_that_the_system_refuses(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read") as refusal:
        read_object(tmp_path / name)
    assert len(str(refusal.value)) < 1200


def test_a_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(CheckpointError, match="has 5 bytes, the limit is 4"):
        read_text(tmp_path / "file", 4)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": "ü"}', encoding="utf-8-sig")
    assert read_text(tmp_path / "file") == '{"a": "ü"}'
    assert read_object(tmp_path / "file") == {"a": "ü"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "f.json: is not JSON"),
        (b"\xff{}", "f.json: is not JSON"),
        (b"[" * 100_000, "f.json: is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "f.json: is not JSON"),
        (b"[1]", "f.json: must hold a JSON object, not list"),
        (b'{"a": {"b": ["\\ud800"]}}', "f.json: a: b is not Unicode text"),
        (b'{"\\uDC00": 1}', "f.json: a key is not Unicode text"),
    ],
    ids=range(7),
)
def test_what_is_no_object_is_one_line(text: bytes, says: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        decode_object(text, "f.json")
    assert str(refusal.value).startswith(says) and "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_numbers_beyond_all_bounds_are_left_to_who_knows_the_field() -> None:
    value = decode_object(
        b'{"a": 1e999, "b": NaN, "c": 18446744073709551616, "d": "\\ud83d\\ude00"}', "f"
    )
    assert value["a"] == float("inf") and value["b"] != value["b"]
    assert value["c"] == 2**64 and value["d"] == "😀"


@pytest.mark.parametrize(
    "error", [PanicException("in\nRust"), ValueError("no"), OverflowError(), MemoryError()]
)
def test_whatever_a_library_raises_names_the_file(error: BaseException) -> None:
    with (
        pytest.raises(CheckpointError, match="f.json: cannot be used") as refusal,
        guarded("f.json"),
    ):
        raise error
    assert refusal.value.__cause__ is error and "\n" not in str(refusal.value)


def test_errors_of_ours_and_the_end_of_the_process_pass() -> None:
    for error in (ConfigError("field"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)) as passed, guarded("f.json"):
            raise error
        assert passed.value is error
