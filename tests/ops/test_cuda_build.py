"""The CUDA sources, compiled for every card by nvcc and linked, on a machine without a card.

One build of the wheel serves all tests here. cuda/gpu/smem_table.txt holds the shared memory of
each kernel instance; `python tests/ops/test_cuda_build.py` writes it anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyserve.ops import build, fakes, toolchain

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "cuda" / "gpu" / "smem_table.txt"
# Bytes of shared memory that one block may have.
SMEM_LIMITS = {arch: kb * 1024 for arch, kb in
               {"80": 163, "86": 99, "89": 99, "90a": 227, "120": 99}.items()}  # fmt: skip

pytestmark = pytest.mark.timeout(900)


@dataclass
class Kernel:
    """An instance of a kernel, float16 and bfloat16 as one: the larger figures."""

    static_smem: dict[str, int] = field(default_factory=dict)  # by architecture
    dynamic_smem: int = 0
    registers: int = 0

    def smem(self, arch: str) -> int:
        return self.static_smem[arch] + self.dynamic_smem


@dataclass
class Wheel:
    """A built wheel, unpacked, and what nvcc said."""

    folder: Path
    log: str
    kernels: dict[str, Kernel]

    @property
    def ops(self) -> Path:
        return self.folder / "pyserve" / "ops" / toolchain.OPS_PRODUCT


def build_wheel(folder: Path) -> Wheel:
    """Build the wheel of this checkout in `folder`, for every card, and read its log."""
    source, out = folder / "source", folder / "out"
    ignore = shutil.ignore_patterns("*.so", "native.json", "__pycache__")
    for name in ("pyserve", "cuda"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    env = {k: v for k, v in os.environ.items() if k != toolchain.ARCHS_VARIABLE}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out]
    result = subprocess.run([*pip, source], env=env, capture_output=True, text=True)
    logs = list(source.glob(f"build/*/native/{toolchain.LOG_NAME}"))
    log = logs[0].read_text() if logs else ""
    errors = [line for line in log.splitlines() if re.search(r"error|FAILED", line)]
    assert result.returncode == 0, "\n".join(errors) or result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    return Wheel(folder / "wheel", log, read_kernels(log, logs[0].parent / "_ops"))


def read_kernels(log: str, objects: Path) -> dict[str, Kernel]:
    """Kernel instances by name, from ptxas's report and from the names that allow_smem leaves."""
    kernels: dict[str, Kernel] = {}
    demangled = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True)
    report = re.compile(
        r"Compiling entry function '(.+)' for 'sm_(\w+)'\n.*\n"
        r".*stack frame.*\n.*Used (\d+) registers(.*)\n"
    )
    for name, arch, registers, rest in report.findall(demangled.stdout):
        kernel = kernels.setdefault(short_name(name), Kernel())
        smem = re.search(r"(\d+) bytes smem", rest)
        size = int(smem[1]) if smem else 0
        kernel.static_smem[arch] = max(size, kernel.static_smem.get(arch, 0))
        kernel.registers = max(int(registers), kernel.registers)
    for path in objects.glob("gpu_*.o"):
        listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        for name, size in re.findall(r"allow_smem<&\(?(.+?)\)?, (\d+)ul>\(\)", listed.stdout):
            kernel = kernels[short_name(name)]
            kernel.dynamic_smem = max(int(size), kernel.dynamic_smem)
    return kernels


def short_name(signature: str) -> str:
    """linear_kernel<T, Tiling<1, 64> > of a demangled signature."""
    name = signature.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(\w+::)+", "", re.sub(r"__half|__nv_bfloat16", "T", name))
    return name[: name.index("(")].replace("(bool)1", "true").replace("(bool)0", "false")


def smem_table(kernels: dict[str, Kernel]) -> str:
    """One line for each kernel instance that uses shared memory."""
    lines = [
        "# Bytes of shared memory of each kernel instance; the cards whose blocks can have them.",
        "# Written by tests/ops/test_cuda_build.py, which compares it with the build.",
        "# static  dynamic  cards  kernel",
    ]
    for name, kernel in sorted(kernels.items()):
        static = max(kernel.static_smem.values())
        fitting = [arch for arch, limit in SMEM_LIMITS.items() if kernel.smem(arch) <= limit]
        cards = "all" if len(fitting) == len(SMEM_LIMITS) else ",".join(fitting)
        if static or kernel.dynamic_smem:
            lines.append(f"{static:8} {kernel.dynamic_smem:8}  {cards}  {name}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    try:
        toolchain.find_cuda_compiler({**os.environ, toolchain.ARCHS_VARIABLE: ""})
    except toolchain.NoCudaCompilerError as error:
        pytest.skip(str(error))
    if shutil.which("c++filt") is None:
        pytest.skip("no binutils")
    return build_wheel(tmp_path_factory.mktemp("cuda_build"))


def test_the_wheel_needs_no_compiler_on_a_card(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = wheel.folder / "pyserve" / "ops"
    manifest = json.loads((packaged / build.MANIFEST_NAME).read_text())
    archs = set(manifest["cuda"]["archs"])
    assert archs >= {"80", "86", "89", "90a", "89-ptx"}
    for arch in archs - {"89-ptx"}:
        assert f"code=sm_{arch} " in wheel.log
    assert (packaged / toolchain.HOST_PRODUCT).exists()
    sources = wheel.folder / "pyserve" / "csrc"
    shipped = {path.relative_to(sources) for path in sources.rglob("*.c*")}
    used = toolchain.source_files(ROOT / "cuda", with_cuda=True)
    assert shipped >= {path.relative_to(ROOT / "cuda") for path in used if path.suffix != ".h"}
    flags = " ".join(toolchain.PORTABLE_X86_FLAGS)
    monkeypatch.setattr(toolchain, "cpu_identity", lambda: f"x86_64\n{flags}")
    driver = tuple(manifest["cuda"]["version"])
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (15, 1)):
        assert build._why_unfit(packaged, build.Card(capability, driver)) is None
    assert build._why_unfit(packaged, None) is None


def test_no_kernel_spills_or_uses_local_memory(wheel: Wheel) -> None:
    frames = re.findall(r"^.*bytes stack frame.*$", wheel.log, re.MULTILINE)
    num_instances = wheel.log.count("Compiling entry function")
    assert len(frames) >= num_instances >= len(SMEM_LIMITS) * 10
    bad = set(frames) - {"    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    assert not bad
    for kernel in wheel.kernels.values():
        assert kernel.static_smem.keys() >= SMEM_LIMITS.keys() - {"120"}


def test_every_kernel_bounds_its_block(wheel: Wheel) -> None:
    """So that ptxas keeps its registers within what a block of that size can have."""
    for path in toolchain.cuda_sources(ROOT / "cuda"):
        text = path.read_text()
        assert text.count("__global__") == len(re.findall(r"__global__ void\s+__launch_b", text))


def test_shared_memory_is_what_the_table_says_and_fits(wheel: Wheel) -> None:
    assert smem_table(wheel.kernels) == TABLE.read_text(), "python tests/ops/test_cuda_build.py"
    dynamic = {name for name, kernel in wheel.kernels.items() if kernel.dynamic_smem}
    for path in toolchain.cuda_sources(ROOT / "cuda"):
        if "extern __shared__" in path.read_text():
            declared = set(re.findall(r"\w+_kernel\b", path.read_text()))
            assert declared & {name.split("<")[0] for name in dynamic}, path.name
    for name in wheel.kernels:  # of what a large card runs there is an instance for the others
        family = [k for n, k in wheel.kernels.items() if n.split("<")[0] == name.split("<")[0]]
        for arch in wheel.kernels[name].static_smem:
            assert min(kernel.smem(arch) for kernel in family) <= SMEM_LIMITS[arch], (name, arch)
        assert wheel.kernels[name].smem("90a") <= SMEM_LIMITS["90a"], name


def symbols(path: Path, *flags: str) -> set[str]:
    listed = subprocess.run(["nm", "-D", *flags, path], capture_output=True, text=True, check=True)
    return {line.split(maxsplit=1)[-1] for line in listed.stdout.splitlines()}


def test_ops_needs_nothing_but_torch_and_the_system(wheel: Wheel) -> None:
    needed = {line.removeprefix("U ") for line in symbols(wheel.ops, "--undefined-only")}
    strong = {name for name in needed if "@" not in name and not name.startswith("w ")}
    assert "w aoti_torch_get_current_cuda_stream" in needed
    torch_lib = toolchain._package("torch") / "lib" / "libtorch_cpu.so"
    exported = {name.split()[-1] for name in symbols(torch_lib, "--defined-only")}
    assert strong and strong <= exported
    own = symbols(wheel.ops, "--defined-only")
    assert not [name for name in own if re.search(r"\bcuda[A-Z]|__cuda|pyserve", name)]
    dynamic = subprocess.run(["readelf", "-d", wheel.ops], capture_output=True, text=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[(.*?)\.so", dynamic))
    assert {"libtorch", "libtorch_cpu"} <= libraries  # libtorch leads to libtorch_cuda
    assert not [name for name in libraries if "cuda" in name]


LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, out = torch.randn(3, 64), torch.empty(3, 64)
torch.ops.pyserve.rms_norm(x, torch.ones(64), 1e-6, out)
torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (64,), eps=1e-6))
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
print([name for name in sys.argv[2:] if not has_kernel(f"pyserve::{name}", "CUDA")])
"""


def test_ops_loads_beside_this_torch_and_has_every_op_for_cuda(wheel: Wheel) -> None:
    if not set(toolchain.cpu_identity().split()) >= toolchain.PORTABLE_X86_FLAGS:
        pytest.skip("this CPU does not run the wheel")
    arguments = [sys.executable, "-c", LOAD, wheel.ops, *fakes.OP_NAMES]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        built = build_wheel(Path(scratch))
    TABLE.write_text(smem_table(built.kernels))
    print(TABLE.read_text(), end="")
