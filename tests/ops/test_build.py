"""Finding and compiling the native products: cache, lock, errors. A fake compiler keeps it fast."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyserve.errors import BuildError
from pyserve.ops import build, toolchain

# Notes each of its runs, then makes what it was asked for; waits while a file "hold" exists.
FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "no compiler 1.0" && exit
echo run >> {folder}/runs
while [ -e {folder}/hold ]; do sleep 0.05; done
[ -e {folder}/fail ] && {{ echo "some.cpp:1: error: no luck"; exit 1; }}
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && touch "$2" && echo "$2:" > "$2.d"
  shift
done
"""
CPU_FILES = toolchain.source_files(build.source_dir(), with_cuda=False)
NUM_SOURCES = sum(path.suffix == ".cpp" for path in CPU_FILES)
NUM_STEPS = NUM_SOURCES + 2  # compiler runs of a full build, with two links

CHILD = """
import sys
from pyserve.ops import build
print(build._find_or_compile(lambda line: print(line, flush=True)))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fake compiler in force and an empty cache."""
    compiler = tmp_path / "c++"
    compiler.write_text(FAKE_COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYSERVE_SANITIZE", "1")  # products in the package are not looked at
    return tmp_path


def num_runs(folder: Path) -> int:
    runs = folder / "runs"
    return len(runs.read_text().split()) if runs.exists() else 0


def wait_for_runs(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while num_runs(folder) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_child() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)


def test_compiles_once_and_says_so(folder: Path) -> None:
    lines: list[str] = []
    products = build._find_or_compile(lines.append)
    assert (products / toolchain.OPS_PRODUCT).exists()
    assert (products / toolchain.HOST_PRODUCT).exists()
    assert lines[0] == f"compiling {NUM_SOURCES} files for this machine, once ..."
    assert lines[-1] == f"compiling: {NUM_STEPS} of {NUM_STEPS} steps done"
    assert num_runs(folder) == NUM_STEPS
    assert build._find_or_compile(pytest.fail) == products


def test_another_compiler_source_or_flag_is_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = toolchain.find_toolchain(None, march="native")
    keys = [build._key(native)]
    other = folder / "other-c++"
    other.write_text("#!/bin/sh\necho another compiler 2.0")
    other.chmod(0o755)
    keys.append(build._key(toolchain.Toolchain(str(other), "native")))
    other.write_text("#!/bin/sh\necho another compiler 2.1")
    keys.append(build._key(toolchain.Toolchain(str(other), "native")))
    keys.append(build._key(toolchain.Toolchain(native.compiler, "native", sanitize=True)))
    keys.append(build._key(toolchain.Toolchain(native.compiler, None)))
    sources = folder / "cuda"
    shutil.copytree(build.source_dir(), sources)
    monkeypatch.setattr(build, "source_dir", lambda: sources)
    assert build._key(native) == keys[0]
    (sources / "cpu" / "vec.h").write_text("// changed")
    keys.append(build._key(native))
    monkeypatch.setattr(toolchain, "cpu_identity", lambda: "another CPU")
    keys.append(build._key(native))
    assert len(set(keys)) == len(keys)


def test_paths_may_hold_spaces_and_signs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = folder / "a $HOME's cache: (1)"
    sources = odd / "the sources"
    shutil.copytree(build.source_dir(), sources)
    monkeypatch.setattr(build, "source_dir", lambda: sources)
    monkeypatch.setenv("PYSERVE_CACHE", str(odd))
    compiler = shutil.copy(folder / "c++", odd / "c++")
    monkeypatch.setenv("CXX", str(compiler))
    assert (build._find_or_compile(lambda line: None) / toolchain.OPS_PRODUCT).exists()


def test_two_processes_at_once_compile_once(folder: Path) -> None:
    (folder / "hold").touch()
    first = start_child()
    wait_for_runs(folder)
    second = start_child()
    assert second.stdout is not None
    assert second.stdout.readline().startswith("waiting for another process")
    (folder / "hold").unlink()
    outputs = [child.communicate(timeout=30)[0].splitlines()[-1] for child in (first, second)]
    assert outputs[0] == outputs[1] and num_runs(folder) == NUM_STEPS


def test_a_killed_builder_leaves_no_lock(folder: Path) -> None:
    (folder / "hold").touch()
    child = start_child()
    wait_for_runs(folder)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    (folder / "hold").unlink()
    products = build._find_or_compile(lambda line: None)
    assert (products / "done").exists()


def test_a_failed_compilation_is_one_line_and_a_log(folder: Path) -> None:
    (folder / "fail").touch()
    with pytest.raises(BuildError, match="compiling the native ops failed, see ") as error:
        build._find_or_compile(lambda line: None)
    message = str(error.value)
    assert "\n" not in message and "--allow-reference-ops" in message
    log = Path(message.split("see ")[1].split(";")[0])
    assert "error: no luck" in log.read_text()
    (folder / "fail").unlink()
    assert (build._find_or_compile(lambda line: None) / "done").exists()


def test_no_compiler_is_one_line_with_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(folder / "empty"))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found: install one .*apt install"):
        build._find_or_compile(lambda line: None)
    monkeypatch.setenv("CXX", "nonesuch")
    with pytest.raises(BuildError, match="CXX=nonesuch is not a program"):
        build._find_or_compile(lambda line: None)


def test_ninja_need_not_be_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert (build._find_or_compile(lambda line: None) / "done").exists()


def test_an_unwritable_cache_names_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("PYSERVE_CACHE", str(folder / "file"))
    with pytest.raises(BuildError, match="set PYSERVE_CACHE to a writable folder"):
        build._find_or_compile(lambda line: None)


def test_no_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.config, "cache_dir", no_home)
    with pytest.raises(BuildError, match="no home folder: set PYSERVE_CACHE"):
        build._find_or_compile(lambda line: None)


def test_packaged_products_must_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {
        "sources": toolchain.source_hash(build.source_dir(), with_cuda=False),
        "soabi": build.sysconfig.get_config_var("SOABI"),
        "march": None,
        "cuda": None,
    }

    def is_usable(**changes: object) -> bool:
        (folder / build.MANIFEST_NAME).write_text(json.dumps({**manifest, **changes}))
        return build._why_unfit(folder, None) is None

    assert build._why_unfit(folder, None) == ""  # nothing there
    assert is_usable()
    assert not is_usable(sources="of another version")
    assert not is_usable(soabi="cpython-27")
    monkeypatch.setattr(toolchain, "cpu_identity", lambda: "x86_64\nsse2 avx")
    assert not is_usable(march="x86-64-v3")
    flags = " ".join(toolchain.PORTABLE_X86_FLAGS)
    monkeypatch.setattr(toolchain, "cpu_identity", lambda: f"x86_64\nsse2 {flags}")
    assert is_usable(march="x86-64-v3")


def test_broken_products_are_a_build_error(folder: Path) -> None:
    products = build._find_or_compile(lambda line: None)  # empty files
    with pytest.raises(BuildError, match="do not load"):
        build._load(products)


REFERENCE_CHILD = """
import torch
from pyserve import ops
from pyserve.ops import build
lines = []
assert build.load_native(allow_reference=True, progress=lines.append) == "reference"
assert build.load_native(allow_reference=False, progress=lines.append) == "reference"
assert len(lines) == 1 and "plain-torch ops: this is slow" in lines[0], lines
x, weight = torch.randn(2, 3, 64), torch.randn(64)
expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected)
args = (x, weight, 1e-6, torch.empty_like(x))
torch.library.opcheck(torch.ops.pyserve.rms_norm.default, args)
schema = str(torch.ops.pyserve.paged_attention.default._schema)
assert "Tensor(a!) out" in schema, schema
assert build.host().pack_step is not None
print("ok")
"""


def test_reference_mode_without_a_compiler(folder: Path) -> None:
    env = {**os.environ, "CXX": "nonesuch"}
    result = subprocess.run(
        [sys.executable, "-c", REFERENCE_CHILD], env=env, capture_output=True, text=True
    )
    assert result.stdout == "ok\n", result.stderr
