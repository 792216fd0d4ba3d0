"""Compiling with fake compilers: what is told of it, how it ends; which nvcc will do."""

from __future__ import annotations

import re
import shutil
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from pyserve.ops import build, nvcc, toolchain
from tests.ops.fake_compiler import (
    NUM_STEPS,
    WAIT_S,
    fake_nvcc,
    find_or_compile,
    num_runs,
    processes_of,
    start_child,
    wait_for_runs,
)
from tests.waiting import wait_until


def test_progress_goes_on_while_one_file_is_compiled(folder: Path) -> None:
    (folder / "hold").touch()
    reports: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        reports.append((done, total))
        if len(reports) > 4:
            (folder / "hold").unlink(missing_ok=True)

    find_or_compile(lambda line: None, report=note)
    held = [done for done, _ in reports[:5]]
    assert held == sorted(held) and held[0] == 0 < held[1] < held[4] < reports[0][1]


def test_who_waits_for_another_process_hears_how_far_it_is(folder: Path) -> None:
    (folder / "hold").touch()
    first = start_child()
    wait_for_runs(folder)
    reports: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        reports.append((done, total))
        if len(reports) > 2:
            (folder / "hold").unlink(missing_ok=True)

    lines: list[str] = []
    find_or_compile(lines.append, report=note)
    first.communicate(timeout=WAIT_S)
    assert lines == ["waiting for another process that compiles the native ops ..."]
    assert reports[0][0] == 0 < reports[2][0] < reports[2][1]
    assert num_runs(folder) == NUM_STEPS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_compiler_outlives_its_builder(folder: Path, number: signal.Signals) -> None:
    (folder / "hold").touch()
    child = start_child()
    wait_for_runs(folder)
    assert processes_of(folder)
    child.send_signal(number)
    child.communicate(timeout=WAIT_S)
    wait_until(lambda: not processes_of(folder))


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_compile_that_is_given_up_ends_its_compilers(folder: Path, is_shared: bool) -> None:
    class Told(BaseException):
        pass

    (folder / "hold").touch()
    if is_shared:  # then it is for this process alone, in a folder that goes with it
        (folder / "cache").mkdir(mode=0o777)
        (folder / "cache").chmod(0o777)
    before = set(Path(tempfile.gettempdir()).glob("pyserve-native-*"))

    def give_up(done: int, total: int) -> None:
        if num_runs(folder):
            raise Told

    with pytest.raises(Told):
        find_or_compile(lambda line: None, report=give_up)
    wait_until(lambda: not processes_of(folder))  # what is killed takes a moment to go
    left = [*(folder / "cache").rglob("*.o"), *(folder / "cache").rglob("*.so")]
    left += (folder / "cache").rglob(toolchain.SCRATCH_NAME)
    assert left == [], "what was half written is gone"
    assert set(Path(tempfile.gettempdir()).glob("pyserve-native-*")) == before
    (folder / "hold").unlink()
    assert (find_or_compile(lambda line: None) / toolchain.OPS_PRODUCT).name


def test_the_cuda_compiler_that_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "_nvcc_candidates", lambda env: candidates)
    candidates: list[str] = []
    driver = (12, 8)

    def find(env: dict[str, str] | None = None) -> nvcc.CudaCompiler:
        return nvcc.find_cuda_compiler(env or {}, capability=(8, 9), driver=driver)

    with pytest.raises(nvcc.NoCudaCompilerError, match="no CUDA compiler"):
        find()
    candidates.append(str(fake_nvcc(folder, "12.1") / "bin" / "nvcc"))
    with pytest.raises(nvcc.CompileError, match=r"nvcc 12\.1 at /.*nvcc: 12\.6 or later"):
        find()
    candidates[:] = [str(fake_nvcc(folder, "13.0") / "bin" / "nvcc")]
    with pytest.raises(nvcc.CompileError, match=r"newer than .* driver, .* CUDA 12\.8: upd"):
        find()
    candidates.append(str(fake_nvcc(folder, "12.6") / "bin" / "nvcc"))
    assert find().version == (12, 6)
    assert find().archs == ("80-ptx",)  # this nvcc does not know the card
    assert find({nvcc.ARCHS_VARIABLE: "80-ptx,90a"}).archs == ("80-ptx", "90a")
    with pytest.raises(nvcc.CompileError, match="PYSERVE_CUDA_ARCHS: 'sm_80' is no arch"):
        find({nvcc.ARCHS_VARIABLE: "80,sm_80"})
    with pytest.raises(nvcc.NoCudaCompilerError, match="PYSERVE_CUDA_ARCHS is none"):
        find({nvcc.ARCHS_VARIABLE: "none"})
    archs = nvcc.find_cuda_compiler({}, driver=driver).archs
    assert archs == ("80", "86", "89", "90a", "80-ptx")  # 120 came with CUDA 12.8
    driver = (13, 1)
    assert "120" in nvcc.find_cuda_compiler({}, driver=driver).archs


def test_where_the_cuda_compiler_is_looked_for(folder: Path) -> None:
    home, other, path = (fake_nvcc(folder, release) for release in ("13.0", "12.8", "12.9"))
    env = {"CUDA_HOME": str(home), "CUDA_PATH": str(other), "PATH": f"/nonesuch:{path}/bin"}
    expected = [f"{toolkit}/bin/nvcc" for toolkit in (home, other, path)]
    assert nvcc._nvcc_candidates(env)[:3] == expected
    assert nvcc._nvcc_candidates({**env, "CUDA_HOME": ""})[:2] == expected[1:]


def gencode(flags: Iterable[str]) -> list[str]:
    return [flag for flag in flags if flag.startswith("-gencode")]


def cuda_for(*archs: str) -> nvcc.CudaCompiler:
    return nvcc.CudaCompiler("nvcc", (13, 0), archs, (), ())


def test_one_run_of_the_front_end_serves_all_cards_before_hopper() -> None:
    assert gencode(cuda_for("80", "86", "89", "90a", "80-ptx").flags()) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_80,code=sm_89",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_a_file_named_after_an_architecture_is_compiled_for_it_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(folder)))
    sources = folder / "cuda"
    shutil.copytree(build.source_dir(), sources)
    monkeypatch.setattr(build, "source_dir", lambda: sources)
    (sources / "gpu" / "attention" / "made_up_sm90a.cu").touch()
    hopper = "-gencode=arch=compute_90a,code=sm_90a"
    for archs, own, others in (
        ("80,90a,90a-ptx", [hopper], "80,90a"),
        ("90a", [hopper], "90a"),
        ("80,80-ptx", None, "80"),
        ("90", None, "90"),
    ):
        monkeypatch.setenv(nvcc.ARCHS_VARIABLE, archs)
        products = find_or_compile(lambda line: None, build.CudaCard((9, 0), (13, 0)))
        text = (products / toolchain.NINJA_FILE).read_text()
        flags = dict(re.findall(r"build _ops/(\S+): .*\n.*\n  flags = (.*)", text))
        named = flags.pop("gpu_attention_made_up_sm90a.o", None)
        assert (gencode(named.split()) if named else None) == own, archs
        decode = flags["gpu_attention_decode.o"].split()
        assert [flag.rpartition("sm_")[2] for flag in gencode(decode) if "sm_" in flag] == (
            others.split(",")
        )
        # What tells the launchers whether they may call it.
        assert ("-DPYSERVE_SM90A" in decode) == (own is not None), archs


def test_a_file_may_not_be_named_after_an_architecture_that_nobody_builds(tmp_path: Path) -> None:
    with pytest.raises(nvcc.CompileError, match=r"_sm90\.cu is named after 90, not one of"):
        cuda_for("90a").archs_of(tmp_path / "made_up_sm90.cu")
