"""Fetching from a stub of the hub: what ends up on disk, what a fault costs, what users read."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir

from pyserve.errors import ConfigError, PlanError, StartupError
from pyserve.hub import download, files, resolve
from pyserve.hub.resolve import model_headers, resolve_model
from pyserve.model.weights import index_checkpoint
from tests.hub.hub_stub import CDN, PART_BYTES, REPO, WEIGHTS, Fault, HubStub
from tests.model.safetensors_files import entry, write
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent


def fetch(tmp_path: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {"revision": None, "token": None, "download_dir": tmp_path / "cache"}
    return resolve_model(REPO, **(defaults | options))


def headers(tmp_path: Path, revision: str | None = None) -> AbstractContextManager[Path]:
    return model_headers(REPO, revision=revision, token=None, download_dir=tmp_path / "cache")


def refusal(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(StartupError) as error:
        fetch(tmp_path, **options)
    line = str(error.value)
    assert "\n" not in line and "hf_secret" not in line and f"--model {REPO}" in line
    return line


def assert_whole(stub: HubStub, folder: Path) -> None:
    names = {WEIGHTS, "config.json", "tokenizer.json", "generation_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == stub.repos[REPO][name], name
    blobs = folder.parent.parent / "blobs"
    assert len(list(blobs.iterdir())) == len(names), "nothing half-done is left"


def blobs_of(tmp_path: Path) -> list[str]:
    return [path.name for path in tmp_path.glob("cache/models--*/blobs/*")]


def test_what_is_fetched_is_what_other_tools_expect(stub: HubStub, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    folder = fetch(tmp_path, progress=lambda *report: reports.append(report))
    assert_whole(stub, folder)
    assert reports[0] == (0, 0) and reports[1][0] == 0 < reports[1][1], "told before the first byte"
    assert reports[-1] == (reports[1][1], reports[1][1]) and reports == sorted(reports)
    assert stub.sent("pytorch_model.bin") == 0
    (repo,) = scan_cache_dir(tmp_path / "cache").repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash) == (REPO, stub.commit)
    assert set(revision.refs) == {"main"}
    stub.seen.clear()
    path = hf_hub_download(REPO, WEIGHTS, cache_dir=tmp_path / "cache", local_files_only=True)
    assert Path(path).read_bytes() == stub.repos[REPO][WEIGHTS]
    assert not [seen.path for seen in stub.seen if "/resolve/" in seen.path]


def test_one_commit_for_all_files_and_the_token_for_the_hub_alone(
    stub: HubStub, tmp_path: Path
) -> None:
    fetch(tmp_path, token="hf_secret\n", revision="main")
    assert all(stub.commit in s.path for s in stub.seen if "/resolve/" in s.path)
    on_hub = [seen for seen in stub.seen if not seen.path.startswith(CDN)]
    assert {seen.token for seen in on_hub} == {"Bearer hf_secret"}
    assert {seen.token for seen in stub.seen if seen.path.startswith(CDN)} == {None}
    assert sum("/resolve/" in seen.path and WEIGHTS in seen.path for seen in stub.seen) == 1


@pytest.mark.parametrize("revision", [None, "main", "0123456789abcdef0123456789abcdef01234567"])
def test_what_is_whole_needs_no_hub(stub: HubStub, tmp_path: Path, revision: str | None) -> None:
    folder = fetch(tmp_path, revision=revision)
    stub.close()
    stub.seen.clear()
    assert fetch(tmp_path, revision=revision) == folder
    assert fetch(tmp_path, revision=stub.commit) == folder
    assert fetch(tmp_path, revision=revision, has_weights=False) == folder
    with headers(tmp_path, revision=revision) as found:
        assert found == folder


def test_a_file_that_is_gone_is_fetched_again(stub: HubStub, tmp_path: Path) -> None:
    folder = fetch(tmp_path)
    (folder / "tokenizer.json").resolve().unlink()
    stub.seen.clear()
    assert_whole(stub, fetch(tmp_path))
    assert len(stub.seen) == 2, "the list, the file"


def test_a_new_commit_is_seen_when_the_ref_moves(stub: HubStub, tmp_path: Path) -> None:
    old = fetch(tmp_path)
    stub.commit = "f" * 40
    stub.repos[REPO]["config.json"] = b'{"model_type": "y"}'
    assert fetch(tmp_path) == old
    stub.seen.clear()
    (tmp_path / "cache/models--org--name/refs/main").write_text(stub.commit)
    new = fetch(tmp_path)
    assert new != old and "y" in (new / "config.json").read_text()
    assert stub.sent(CDN) == 0, "weights that have not changed are not fetched again"


def test_offline(stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refusal(tmp_path)
    assert "HF_HUB_OFFLINE is set" in line and str(tmp_path / "cache") in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetch(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stub.seen.clear()
    assert fetch(tmp_path) == folder
    shutil.rmtree(tmp_path / "cache/models--org--name/.pyserve")  # as another tool leaves it
    assert fetch(tmp_path) == folder
    (folder / WEIGHTS).unlink()
    assert "not whole in the cache" in refusal(tmp_path)
    assert fetch(tmp_path, has_weights=False) == folder
    assert not stub.seen


def test_a_hub_that_is_gone_leaves_what_another_tool_has_fetched(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(tmp_path)
    shutil.rmtree(tmp_path / "cache/models--org--name/.pyserve")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch(tmp_path) == folder
    line = refusal(tmp_path, revision="other")
    assert "it cannot be reached, 5 times" in line and "http://127.0.0.1:9" in line


def test_several_files_of_weights(stub: HubStub, tmp_path: Path) -> None:
    stored = stub.repos[REPO]
    part = stored.pop(WEIGHTS)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for index, name in enumerate(names):
        stored[name] = part[:-1] + bytes([index])
    stored["consolidated.safetensors"] = part
    weight_map = ", ".join(f'"{name}": "{name}"' for name in names)
    stored["model.safetensors.index.json"] = f'{{"weight_map": {{{weight_map}}}}}'.encode()
    folder = fetch(tmp_path)
    assert [(folder / name).read_bytes() for name in names] == [stored[name] for name in names]
    assert not (folder / "consolidated.safetensors").exists()


def test_the_plan_is_checked_before_the_first_byte_of_weights(
    stub: HubStub, tmp_path: Path
) -> None:
    seen: list[str] = []

    def check(folder: Path) -> None:
        (tensor,) = index_checkpoint(folder).values()
        assert tensor.shape == (750_000,) and (folder / "config.json").read_text()
        seen.append(str(folder))
        raise PlanError(f"{folder}/x: a context of 9 tokens does not fit\n  weights 3 MiB")

    with pytest.raises(PlanError, match="^x: a context of 9 tokens does not fit\n  weights"):
        fetch(tmp_path, check=check)
    assert stub.sent(CDN) <= files.FIRST_BYTES and not Path(seen[0]).exists()
    assert not any(len(name) > 40 for name in blobs_of(tmp_path)), "no weights"


def test_a_header_longer_than_the_first_read(stub: HubStub, tmp_path: Path) -> None:
    names = {f"tensor {i:09}": entry("F32", [1], 4 * i, 4 * i + 4) for i in range(3000)}
    write(tmp_path / "long", names, bytes(12_000))
    stub.repos[REPO][WEIGHTS] = (tmp_path / "long").read_bytes()
    with headers(tmp_path) as folder:
        assert len(index_checkpoint(folder)) == 3000
    assert not folder.exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", [b"", b"short", b"\xff" * 8, b"\xff" * 100_000])
def test_what_is_no_safetensors_is_refused_before_the_download(
    stub: HubStub, tmp_path: Path, text: bytes
) -> None:
    stub.repos[REPO][WEIGHTS] = text
    line = refusal_of_check(tmp_path)
    assert line.startswith(WEIGHTS)


def test_a_header_over_the_limit_is_not_fetched(stub: HubStub, tmp_path: Path) -> None:
    header_bytes = 32 * 2**20 + 1
    text = bytearray(8 + header_bytes)
    text[:8] = header_bytes.to_bytes(8, "little")
    stub.repos[REPO][WEIGHTS] = bytes(text)
    assert f"a header of {header_bytes} bytes, the limit is 33554432" in refusal_of_check(tmp_path)
    assert stub.sent(CDN) <= files.FIRST_BYTES


def refusal_of_check(tmp_path: Path) -> str:
    with pytest.raises(StartupError) as error:
        fetch(tmp_path, check=index_checkpoint)
    return str(error.value)


def test_the_disk_is_checked_before_the_first_byte_of_weights(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=resolve.DISK_MARGIN_BYTES + 2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refusal(tmp_path)
    assert "needs 271.4 MB" in line and "270.4 MB are free" in line
    assert str(tmp_path / "cache") in line and "--download-dir" in line
    assert stub.sent(CDN) == 0


def test_a_text_that_is_too_large(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "MAX_TEXT_BYTES", 17)
    assert "config.json has 19 bytes, the limit is 17" in refusal(tmp_path)
    assert stub.sent("/resolve/") == 0
    with pytest.raises(StartupError, match="the limit is 17"):
        with headers(tmp_path):
            pass


def test_many_texts_are_summed_before_the_first_is_fetched(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.repos[REPO] |= {f"tokenizer_{number}.json": b"x" * 1000 for number in range(50)}
    monkeypatch.setattr(resolve, "MAX_TEXTS_BYTES", 49_000)
    line = refusal(tmp_path)
    assert "files beside the weights have 5" in line and "the limit is 49000" in line
    assert stub.sent("/resolve/") == 0


def test_the_disk_is_checked_before_the_first_text(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=resolve.DISK_MARGIN_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refusal(tmp_path)
    assert "are free there: make room" in line
    assert stub.sent("/resolve/") == 0 and stub.sent(CDN) == 0


def test_headers_are_summed_too(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_HEADERS_BYTES", 20)
    assert "the headers of its 1 safetensors files have more than 20 bytes" in refusal(tmp_path)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 8])
def test_a_disk_that_is_full_at_any_moment_keeps_no_halves(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Every name that is there stands for all of it, and the next start goes on."""
    left = number
    pwrite = os.pwrite

    def write(fd: int, data: bytes, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", write)
        line = refusal(tmp_path)
    assert "No space left on device; make room and start again" in line
    for path in (tmp_path / "cache").rglob("*"):
        if path.parent.name == "blobs" and "." not in path.name:
            assert path.read_bytes() in stub.repos[REPO].values()
        assert not path.name.endswith(".tmp")
    assert_whole(stub, fetch(tmp_path))


@pytest.mark.parametrize("name", ["pwrite", "ftruncate", "fdatasync"])
def test_a_disk_that_fills_up(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, fail)
    line = refusal(tmp_path)
    assert "No space left on device" in line and "--download-dir" in line


def test_a_folder_that_cannot_be_written(stub: HubStub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "another folder can be named with --download-dir" in refusal(tmp_path)


def test_gated_and_private(stub: HubStub, tmp_path: Path) -> None:
    stub.gated = True
    page = f"{stub.endpoint}/{REPO}"
    line = refusal(tmp_path)
    assert (
        f"is gated: accept its terms at {page}" in line
        and "--hf-token TOKEN or in HF_TOKEN" in line
    )
    line = refusal(tmp_path, token="hf_other")
    assert "the account of your token may not read it yet" in line and page in line
    fetch(tmp_path, token="hf_secret")
    stub.private = True
    line = refusal(tmp_path, download_dir=tmp_path / "2")
    assert "it is private: pass an access token with --hf-token TOKEN" in line
    line = refusal(tmp_path, token="hf_other", download_dir=tmp_path / "2")
    assert "your token does not open it" in line


def test_the_token_that_is_kept(
    stub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--hf-token without a value."""
    stub.private = True
    with pytest.raises(ConfigError, match="--hf-token without a value .* run hf auth login"):
        fetch(tmp_path, token=True)
    monkeypatch.setattr(resolve, "get_token", lambda: stub.token)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert "it is private" in refusal(tmp_path)
    fetch(tmp_path, token=True)


def test_no_such_model_or_revision(stub: HubStub, tmp_path: Path) -> None:
    line = refusal(tmp_path, revision="v9")
    assert "has no revision v9" in line
    del stub.repos[REPO]
    line = refusal(tmp_path, token="hf_x")
    assert f"is not at {stub.endpoint}/{REPO} (revision main)" in line


@pytest.mark.parametrize("path", ["/api/", "config.json", CDN])
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (Fault(status=500), "status 500"),
        (Fault(status=503, headers={"Retry-After": "0"}), "status 503"),
        (Fault(status=429, headers={"Retry-After": "0"}), "too many requests from this address"),
        (Fault(hang_s=0.8), "no byte for 0 s"),
    ],
    ids=["500", "503", "429", "hang"],
)
def test_faults_that_pass_and_that_stay(
    stub: HubStub, tmp_path: Path, path: str, fault: Fault, line: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    stub.faults = {path: [fault, fault, Fault()]}
    assert_whole(stub, fetch(tmp_path))
    assert line in caplog.text and "trying again in" in caplog.text
    if fault.hang_s:  # a connection that hangs for good takes its time
        return
    stub.faults = {path: [fault]}
    message = refusal(tmp_path, download_dir=tmp_path / "2")
    assert line in message and "5 times" in message and "fails on" in message


def test_a_wait_that_is_asked_for_is_kept(stub: HubStub, tmp_path: Path) -> None:
    stub.faults = {"/api/": [Fault(status=429, headers={"Retry-After": "1"}), Fault()]}
    began_s = time.monotonic()
    fetch(tmp_path)
    assert 1.0 <= time.monotonic() - began_s < 30.0
    stub.faults = {"/api/": [Fault(status=429, headers={"Retry-After": "4000"})]}
    line = refusal(tmp_path, download_dir=tmp_path / "2")
    assert "asks to wait 4000 s" in line and "a token raises the limit" in line


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (Fault(cut=1000), "early"),
        (Fault(lie=5), "is listed"),
        (Fault(lie=-5), "is listed"),
        (Fault(cut=0), "early"),
    ],
    ids=["cut", "longer", "shorter", "empty"],
)
def test_wrong_lengths(
    stub: HubStub, tmp_path: Path, fault: Fault, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    stub.faults = {CDN: [Fault(), fault, fault, Fault()]}
    assert_whole(stub, fetch(tmp_path))
    if fault.cut:  # goes on where it was cut: some bytes each time are no fault that stays
        return
    stub.faults = {CDN: [fault]}
    message = refusal(tmp_path, download_dir=tmp_path / "2")
    assert WEIGHTS in message and (line in message or "connection broke" in message)
    assert WEIGHTS not in [path.name for path in tmp_path.rglob("2/**/snapshots/**/*")]


def test_a_damaged_file_is_fetched_once_more_and_never_kept(
    stub: HubStub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stub.faults = {CDN: [Fault(), Fault(corrupt=True), Fault()]}
    assert_whole(stub, fetch(tmp_path))
    assert "is damaged, fetching it again" in caplog.text
    stub.faults = {CDN: [Fault(corrupt=True)]}
    line = refusal(tmp_path, download_dir=tmp_path / "2")
    assert "arrives damaged" in line
    assert not list((tmp_path / "2").rglob("*.pyserve-*"))


def test_a_server_without_ranges(stub: HubStub, tmp_path: Path) -> None:
    stub.faults = {CDN: [Fault(no_range=True)]}
    assert "does not send parts of files" in refusal(tmp_path)


def test_addresses_that_expire(stub: HubStub, tmp_path: Path) -> None:
    stub.faults = {CDN: [Fault(), Fault(status=403), Fault()]}
    assert_whole(stub, fetch(tmp_path))


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"sha": 1}', b'{"sha": "x", "siblings": []}']
)  # fmt: skip
def test_what_does_not_answer_as_the_hub_does(
    stub: HubStub, tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.hub.hub_stub.json.dumps", lambda info: body.decode())
    assert stub.endpoint in refusal(tmp_path)


@pytest.mark.parametrize("endpoint", ["hub.example", "http://", "http://[", "http://a:port"])
def test_an_endpoint_that_is_none(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConfigError, match="HF_ENDPOINT must be"):
        fetch(tmp_path)


KILLED = """
import sys
from pathlib import Path
from pyserve.hub import download, resolve
download.PART_BYTES = {part}
resolve.resolve_model("org/name", revision=None, token=None, download_dir=Path(sys.argv[1]))
"""


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_any_time_ends_whole(stub: HubStub, tmp_path: Path, seed: int) -> None:
    """What is fetched twice is at most a part a stream and kill."""
    stub.rate = 2e6
    num_kills = kill_until_whole(stub, tmp_path, random.Random(seed))
    assert_whole(stub, fetch(tmp_path))
    again = stub.sent(CDN) - len(stub.repos[REPO][WEIGHTS])
    assert num_kills and again <= num_kills * (
        download.NUM_STREAMS * PART_BYTES + files.FIRST_BYTES
    )


def has_begun(process: subprocess.Popen[bytes], stub: HubStub, sent: int) -> bool:
    """More than `sent` bytes have been asked for; or it has ended."""
    return process.poll() is not None or stub.sent() != sent


def kill_until_whole(stub: HubStub, tmp_path: Path, chance: random.Random) -> int:
    """Start, kill, start again; returns how often it was killed."""
    command = [sys.executable, "-c", KILLED.format(part=PART_BYTES), str(tmp_path / "cache")]
    settings = {**os.environ, "HF_ENDPOINT": stub.endpoint, "HF_HUB_OFFLINE": "0"}
    for num_kills in range(100):
        sent = stub.sent()
        process = subprocess.Popen(command, cwd=ROOT, env=settings, stderr=subprocess.DEVNULL)
        if num_kills < 3:
            wait_until(partial(has_begun, process, stub, sent))
        try:
            wait_s = chance.uniform(0.0, 0.15) if num_kills < 3 else 60.0
            assert process.wait(wait_s) == 0
            return num_kills
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
    raise AssertionError("never whole")


def test_two_at_once_fetch_it_once(stub: HubStub, tmp_path: Path) -> None:
    stub.rate = 4e6
    command = [sys.executable, "-c", KILLED.format(part=PART_BYTES), str(tmp_path / "cache")]
    settings = {**os.environ, "HF_ENDPOINT": stub.endpoint, "HF_HUB_OFFLINE": "0"}
    both = [subprocess.Popen(command, cwd=ROOT, env=settings) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert_whole(stub, fetch(tmp_path))
    assert stub.sent(CDN) == len(stub.repos[REPO][WEIGHTS]) + files.FIRST_BYTES
