"""Finding and compiling the native products: cache, lock, errors. A fake compiler keeps it fast."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pyserve import config
from pyserve.errors import BuildError
from pyserve.ops import build, build_cache, nvcc, toolchain
from tests.ops.fake_compiler import (
    NUM_SOURCES,
    NUM_STEPS,
    WAIT_S,
    fake_nvcc,
    find_or_compile,
    num_runs,
    start_child,
    wait_for_runs,
)
from tests.read_only import read_only

ROOT = Path(__file__).resolve().parents[2]


def test_compiles_once_and_says_so(folder: Path) -> None:
    lines: list[str] = []
    reports: list[tuple[int, int]] = []
    products = find_or_compile(lines.append, report=lambda *told: reports.append(told))
    assert (products / toolchain.OPS_PRODUCT).exists()
    assert (products / toolchain.HOST_PRODUCT).exists()
    assert lines[0] == f"compiling {NUM_SOURCES} files for this machine, once ..."
    assert len(lines) == 1
    done, totals = zip(*reports, strict=True)
    assert done[0] == 0 and list(done) == sorted(done) and done[-1] == totals[-1]
    assert len(set(totals)) == 1 and len(set(done)) > NUM_STEPS / 2
    assert num_runs(folder) == NUM_STEPS
    assert find_or_compile(pytest.fail) == products


def test_what_is_compiled_is_found_where_nothing_can_be_written(folder: Path) -> None:
    lines: list[str] = []
    cache = folder / "cache"
    products = find_or_compile(lines.append)
    with read_only(cache) as tried:
        assert find_or_compile(lines.append) == products
    assert tried == [] and num_runs(folder) == NUM_STEPS
    shutil.rmtree(cache)
    cache.mkdir()
    remedy = r"\(Read-only file system\): set PYSERVE_CACHE to a writable folder"
    with read_only(cache), pytest.raises(BuildError, match=remedy):
        find_or_compile(lines.append)


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
    keys.append(build._key(toolchain.Toolchain(native.compiler, "native", is_sanitized=True)))
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
    assert (find_or_compile(lambda line: None) / toolchain.OPS_PRODUCT).exists()


def test_two_processes_at_once_compile_once(folder: Path) -> None:
    (folder / "hold").touch()
    first = start_child()
    wait_for_runs(folder)
    second = start_child()
    assert second.stdout is not None
    assert second.stdout.readline().startswith("waiting for another process")
    (folder / "hold").unlink()
    outputs = [child.communicate(timeout=WAIT_S)[0].splitlines()[-1] for child in (first, second)]
    assert outputs[0] == outputs[1] and num_runs(folder) == NUM_STEPS


def test_a_killed_builder_leaves_no_lock(folder: Path) -> None:
    (folder / "hold").touch()
    child = start_child()
    wait_for_runs(folder)
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=WAIT_S)
    (folder / "hold").unlink()
    products = find_or_compile(lambda line: None)
    assert (products / build_cache.MARK_NAME).exists()


def test_a_failed_compilation_is_one_line_and_a_log(folder: Path) -> None:
    (folder / "fail").touch()
    with pytest.raises(BuildError, match="compiling the native ops failed, see ") as error:
        find_or_compile(lambda line: None)
    message = str(error.value)
    assert "\n" not in message
    log = Path(message.split("see ")[1])
    assert "error: no luck" in log.read_text()
    (folder / "fail").unlink()
    assert (find_or_compile(lambda line: None) / build_cache.MARK_NAME).exists()


def test_no_compiler_is_one_line_with_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(folder / "empty"))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found: install one .*apt install"):
        find_or_compile(lambda line: None)
    monkeypatch.setenv("CXX", "nonesuch")
    with pytest.raises(BuildError, match="CXX=nonesuch is not a program"):
        find_or_compile(lambda line: None)


def test_ninja_need_not_be_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert (find_or_compile(lambda line: None) / build_cache.MARK_NAME).exists()


def test_an_unwritable_cache_names_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("PYSERVE_CACHE", str(folder / "file"))
    with pytest.raises(BuildError, match="set PYSERVE_CACHE to a writable folder"):
        find_or_compile(lambda line: None)


def test_no_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(config, "cache_dir", no_home)
    with pytest.raises(BuildError, match="no home folder: set PYSERVE_CACHE"):
        find_or_compile(lambda line: None)


def test_packaged_products_must_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {
        "sources": toolchain.source_hash(build.source_dir(), has_cuda=False),
        "soabi": sysconfig.get_config_var("SOABI"),
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
    (folder / toolchain.OPS_PRODUCT).write_bytes(b"code")
    assert is_usable(sizes={toolchain.OPS_PRODUCT: 4})
    for sizes in ({toolchain.OPS_PRODUCT: 5}, {toolchain.HOST_PRODUCT: 0}):
        assert not is_usable(sizes=sizes)
        assert "is damaged: install pyserve again" in str(build._why_unfit(folder, None))


HOPPER = build.CudaCard(capability=(9, 0), driver=(13, 0))


def test_a_card_gets_its_own_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(folder)))
    lines: list[str] = []
    products = find_or_compile(lines.append, HOPPER)
    gpu = build.source_dir() / "gpu"
    num_files = NUM_SOURCES + len([*gpu.rglob("*.cu"), *gpu.rglob("*.cpp")])
    assert lines[0] == f"compiling {num_files} files for this machine, once ..."
    assert num_runs(folder) == num_files + 2
    log = (products / toolchain.LOG_NAME).read_text()
    assert "arch=compute_90a,code=sm_90a -" in log and "code=sm_80" not in log
    assert f"-ccbin {folder}/c++" in log and "-lcudart_static" in log
    assert f"-L{folder}/cuda-13.0/lib " in log
    assert f"-isystem{folder}/cuda-13.0/include" in log
    assert find_or_compile(pytest.fail, HOPPER) == products
    for other in (build.CudaCard((8, 6), (13, 0)), None):
        assert find_or_compile(lambda line: None, other) != products


def test_a_changed_kernel_leaves_the_cpu_products(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(folder)))
    sources = folder / "cuda"
    shutil.copytree(build.source_dir(), sources)
    monkeypatch.setattr(build, "source_dir", lambda: sources)
    before = [find_or_compile(lambda line: None, card) for card in (None, HOPPER)]
    (sources / "gpu" / "a_new_topic").mkdir()
    (sources / "gpu" / "a_new_topic" / "another.cuh").touch()
    after = [find_or_compile(lambda line: None, card) for card in (None, HOPPER)]
    assert before[0] == after[0] and before[1] != after[1]


@pytest.mark.parametrize(
    "archs, capability, expected",
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),  # machine code runs on later cards of the same generation
        ("86", (8, 0), False),
        ("80,86,89", (9, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("120", (12, 1), True),
        ("80-ptx", (12, 0), True),
        ("89-ptx", (8, 6), False),
        ("90a-ptx", (9, 0), False),
        ("", (9, 0), False),
    ],
)
def test_what_runs_on_which_card(archs: str, capability: tuple[int, int], expected: bool) -> None:
    names = archs.split(",") if archs else []
    assert build.covers(names, capability, is_ptx_readable=True) == expected
    without_ptx = [name for name in names if "ptx" not in name]
    assert not build.covers(set(names) - set(without_ptx), capability, is_ptx_readable=False)


def test_packaged_cuda_products_must_fit_the_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why(card: build.CudaCard | None, **cuda: object) -> str | None:
        manifest = {
            "sources": toolchain.source_hash(build.source_dir(), has_cuda=bool(cuda)),
            "soabi": sysconfig.get_config_var("SOABI"),
            "march": None,
            "cuda": cuda or None,
        }
        (folder / build.MANIFEST_NAME).write_text(json.dumps(manifest))
        return build._why_unfit(folder, card)

    archs = ["80", "90a", "80-ptx"]
    assert why(None, version=[13, 0], archs=archs) is None
    assert why(HOPPER, version=[13, 0], archs=archs) is None
    assert why(HOPPER) == "the packaged ops are without CUDA"
    old = build.CudaCard((9, 0), (12, 8))
    assert why(old, version=[13, 0], archs=archs) == (
        "the packaged CUDA ops need a driver for CUDA 13"
    )
    assert why(old, version=[12, 9], archs=archs) is None
    new = build.CudaCard((10, 0), (12, 8))
    assert why(new, version=[12, 8], archs=archs) is None
    assert why(new, version=[12, 9], archs=archs) == (  # the driver does not know such PTX
        "the packaged CUDA ops (80, 90a, 80-ptx) are not for compute capability 10.0"
    )
    monkeypatch.setenv(nvcc.ARCHS_VARIABLE, "80-ptx")
    assert why(HOPPER, version=[13, 0], archs=archs) == (
        "the packaged CUDA ops (80, 90a, 80-ptx) are not PYSERVE_CUDA_ARCHS"
    )
    assert why(HOPPER, version=[13, 0], archs=["80-ptx"]) is None


def test_no_cuda_compiler_is_one_line_with_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvcc, "_nvcc_candidates", lambda env: [])
    with pytest.raises(BuildError, match="nvcc.*pip install .cuda-toolkit.nvcc,cccl.==13"):
        find_or_compile(pytest.fail, HOPPER)
    with pytest.raises(BuildError, match="install NVIDIA's CUDA toolkit 12.8, or install a wheel"):
        find_or_compile(pytest.fail, build.CudaCard((8, 0), (12, 8)))


def test_the_twins_do_not_serve_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(
        progress: object, card: build.CudaCard | None, report: object
    ) -> AbstractContextManager[Path]:
        raise BuildError("no luck")

    monkeypatch.setattr(build, "_mode", None)
    monkeypatch.setattr(build, "_products", fail)
    monkeypatch.setattr(build, "_current_card", lambda: HOPPER)
    with pytest.raises(BuildError, match="no luck; or pass --device cpu"):
        build.load_native(is_reference_allowed=True, progress=pytest.fail, device="cuda")
    with pytest.raises(BuildError, match="no luck; or pass --allow-reference-ops"):
        build.load_native(is_reference_allowed=False, progress=pytest.fail)


def test_broken_products_are_a_build_error(folder: Path) -> None:
    products = find_or_compile(lambda line: None)  # empty files
    with pytest.raises(BuildError, match="do not load"):
        build._load(products)


@pytest.mark.parametrize("damage", ["short", "longer", "empty", "changed", "gone", "mark"])
def test_what_a_power_cut_left_is_compiled_again(folder: Path, damage: str) -> None:
    products = find_or_compile(lambda line: None)
    path = products / toolchain.OPS_PRODUCT
    path.write_bytes(b"machine code")
    build_cache.mark_whole(products, build.PRODUCTS)
    assert find_or_compile(pytest.fail) == products
    runs = num_runs(folder)
    if damage == "gone":
        path.unlink()
    elif damage == "mark":
        (products / build_cache.MARK_NAME).write_bytes(b"")
    else:
        contents = {"short": b"mach", "longer": b"machine code\0", "empty": b""}
        path.write_bytes(contents.get(damage, b"machine c0de"))
    lines: list[str] = []
    assert find_or_compile(lines.append) == products
    assert lines[0] == f"the compiled files in {products} are damaged: compiling them again"
    assert num_runs(folder) == runs + NUM_STEPS, "objects may be short too"
    assert find_or_compile(pytest.fail) == products


def test_a_cache_that_others_can_write_to_is_not_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = find_or_compile(lambda line: None)
    products.parent.chmod(0o777)
    lines: list[str] = []
    alone = find_or_compile(lines.append)
    assert lines[0].startswith(f"everybody can write to {products.parent}: compiling for this")
    assert "set PYSERVE_CACHE to a folder that nobody else can write to" in lines[0]
    assert folder not in alone.parents and not alone.exists(), "gone once it is loaded"
    products.parent.chmod(0o700)
    assert find_or_compile(pytest.fail) == products
    (products / toolchain.OPS_PRODUCT).chmod(0o666)
    assert find_or_compile(lines.append) == products
    assert "are damaged" in lines[-2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("level", ["products", "native", "cache"])
def test_a_cache_of_somebody_else_is_not_loaded(folder: Path, level: str) -> None:
    """Its name is a hash of what everybody knows: another user may have put it there before us."""
    products = find_or_compile(lambda line: None)
    given = {"products": products, "native": products.parent, "cache": products.parent.parent}
    os.chown(given[level], 4321, 4321)
    lines: list[str] = []
    assert find_or_compile(lines.append) != products
    assert f"{given[level]} belongs to user 4321" in lines[0]


REFERENCE_CHILD = """
import torch
from pyserve import ops
from pyserve.ops import build
lines = []
assert build.load_native(is_reference_allowed=True, progress=lines.append) == "reference"
assert build.load_native(is_reference_allowed=False, progress=lines.append) == "reference"
assert len(lines) == 1 and "plain-torch ops: this is slow" in lines[0], lines
x, weight = torch.randn(2, 3, 64), torch.randn(64)
expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected)
args = (x, weight, 1e-6, torch.empty_like(x))
torch.library.opcheck(torch.ops.pyserve.rms_norm.default, args)
schema = str(torch.ops.pyserve.paged_attention.default._schema)
assert "Tensor(b!) out" in schema, schema
assert build.host().pack_step is not None
print("ok")
"""


def test_reference_mode_without_a_compiler(folder: Path) -> None:
    env = {**os.environ, "CXX": "nonesuch"}
    result = subprocess.run(
        [sys.executable, "-c", REFERENCE_CHILD], env=env, capture_output=True, text=True
    )
    assert result.stdout == "ok\n", result.stderr


@pytest.mark.parametrize("has_cuda", [False, True])
def test_setup_leaves_what_fits_its_sources(folder: Path, has_cuda: bool) -> None:
    env = {**os.environ, "CUDA_HOME": str(fake_nvcc(folder))}
    if not has_cuda:
        env[nvcc.ARCHS_VARIABLE] = "none"
    places = ["--build-lib", f"{folder}/lib", "--build-temp", f"{folder}/temp"]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packaged = folder / "lib" / "pyserve" / "ops"
    manifest = json.loads((packaged / build.MANIFEST_NAME).read_text())
    assert manifest["sources"] == toolchain.source_hash(build.source_dir(), has_cuda=has_cuda)
    assert (manifest["cuda"] is not None) == has_cuda
    assert (packaged / toolchain.OPS_PRODUCT).exists()
