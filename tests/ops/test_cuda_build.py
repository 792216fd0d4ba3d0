"""The CUDA sources, compiled for every card by nvcc and linked, on a machine without a card.

One build of the wheel (cuda_wheel.py) serves all tests here. cuda/gpu/smem_table.txt holds the
shared memory of each kernel instance; `python -m tests.ops.test_cuda_build` writes it anew.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyserve.ops import build, fakes, nvcc, toolchain
from tests.ops.cuda_wheel import STASH_KEY, Kernel, Wheel, building, demangle, short_name

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "cuda" / "gpu" / "smem_table.txt"
# Of a card of each architecture: SMs, KB of shared memory that a block may have, that an SM has.
CARDS = {
    "80": (108, 163, 164),
    "86": (84, 99, 100),
    "89": (128, 99, 100),
    "90a": (132, 227, 228),
    "120": (170, 99, 100),
}
SMEM_LIMITS = {arch: block * 1024 for arch, (_, block, _) in CARDS.items()}
# Objects of the files that ask what card it is.
CHOOSY = (
    "linear_dispatch", "linear_linear", "linear_few_rows_sm90a", "linear_gemm_sm90a",
    "linear_few_rows_w4a16", "linear_few_rows_w4a16_sm90a", "linear_gemm_w4a16_sm90a",
    "linear_few_rows_lora", "linear_few_rows_w4a16_lora_sm90a",
    "linear_few_rows_fp8", "linear_gemm_w8a8_sm90a", "experts_route", "experts_grouped",
    "experts_grouped_few_rows",
    "experts_grouped_few_rows_fp8", "experts_grouped_few_rows_sm90a", "experts_grouped_gemm_sm90a",
    "experts_grouped_few_rows_w4a16", "experts_grouped_few_rows_w4a16_sm90a",
    "experts_grouped_gemm_w4a16_sm90a",
    "attention_decode", "attention_decode_general", "attention_latent", "attention_prefill",
    "attention_prefill_general", "attention_prefill_sm90a", "attention_plan", "lora_expand",
    "lora_expand_many", "lora_shrink_many",
)  # fmt: skip

pytestmark = pytest.mark.timeout(900)


def smem_table(kernels: dict[str, Kernel]) -> str:
    """One line for each kernel instance that uses shared memory."""
    lines = [
        "# Bytes of shared memory of each kernel instance; the cards whose blocks can have them.",
        "# Written by tests/ops/test_cuda_build.py, which compares it with the build.",
        "# static  dynamic  cards  kernel",
    ]
    for name, kernel in sorted(kernels.items()):
        static = max(kernel.static_smem.values())
        fitting = [arch for arch in kernel.static_smem if kernel.smem(arch) <= SMEM_LIMITS[arch]]
        fitting.sort(key=list(SMEM_LIMITS).index)
        cards = "all" if len(fitting) == len(SMEM_LIMITS) else ",".join(fitting)
        if static or kernel.dynamic_smem:
            lines.append(f"{static:8} {kernel.dynamic_smem:8}  {cards}  {name}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def wheel(pytestconfig: pytest.Config) -> Wheel:
    try:
        nvcc.find_cuda_compiler({**os.environ, nvcc.ARCHS_VARIABLE: ""})
    except nvcc.NoCudaCompilerError as error:
        pytest.skip(str(error))
    if shutil.which("c++filt") is None:
        pytest.skip("no binutils")
    return pytestconfig.stash[STASH_KEY].finish()


@pytest.fixture(scope="module")
def launched(wheel: Wheel) -> dict[str, set[str]]:
    """By architecture: the kernels that the launchers of CHOOSY files choose."""
    native = toolchain.find_toolchain(os.environ.get("CXX"), march=None)
    cuda = nvcc.find_cuda_compiler({**os.environ, nvcc.ARCHS_VARIABLE: ""})
    program = wheel.objects / "launch_limits"
    includes = [f"-I{wheel.sources}", *(f"-isystem{path}" for path in cuda.include_dirs)]
    objects = [wheel.objects / f"gpu_{name}.o" for name in CHOOSY]
    source = Path(__file__).with_name("launch_limits.cpp")
    command = [native.compiler, "-std=c++20", *includes]
    subprocess.run([*command, source, *objects, "-o", program], check=True)
    names = {}
    for arch, (num_sms, block_kb, sm_kb) in CARDS.items():
        limits = [arch.rstrip("a"), str(num_sms), str(block_kb * 1024), str(sm_kb * 1024)]
        result = subprocess.run([program, *limits], capture_output=True, text=True)
        assert result.returncode == 0, f"sm_{arch}: {result.stderr}"
        names[arch] = {short_name(line) for line in demangle(result.stdout).splitlines()}
    return names


def test_the_wheel_needs_no_compiler_on_a_card(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = wheel.folder / "pyserve" / "ops"
    manifest = json.loads((packaged / build.MANIFEST_NAME).read_text())
    archs = set(manifest["cuda"]["archs"])
    assert archs >= {"80", "86", "89", "90a", "80-ptx"}
    for arch in archs - {"80-ptx"}:
        assert f"code=sm_{arch} " in wheel.log
    assert (packaged / toolchain.HOST_PRODUCT).exists()
    shipped = wheel.folder / "pyserve" / "csrc"
    used, own = (
        {path.relative_to(folder) for path in toolchain.source_files(folder, has_cuda=True)}
        for folder in (wheel.sources, shipped)
    )
    assert used == own
    flags = " ".join(toolchain.PORTABLE_X86_FLAGS)
    monkeypatch.setattr(toolchain, "cpu_identity", lambda: f"x86_64\n{flags}")
    monkeypatch.setattr(build, "source_dir", lambda: shipped)
    driver = tuple(manifest["cuda"]["version"])
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (15, 1)):
        assert build._why_unfit(packaged, build.CudaCard(capability, driver)) is None
    assert build._why_unfit(packaged, None) is None


def test_no_kernel_spills_or_uses_local_memory(wheel: Wheel, launched: dict[str, set[str]]) -> None:
    """On the cards that it is launched on."""
    chosen = set().union(*launched.values())
    none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    arch, name, num_frames, bad = "", "", 0, []
    for line in wheel.log.splitlines():
        if entry := re.search(r"Compiling entry function .* for 'sm_(\w+)'", line):
            arch = entry[1]
        elif function := re.search(r"Function properties for (.*)", line):
            name = short_name(function[1])
        elif "bytes stack frame" in line:
            num_frames += 1
            if line.strip() != none and (name not in chosen or name in launched[arch]):
                bad.append(f"sm_{arch} {name}: {line.strip()}")
    assert not bad, "\n".join(bad)
    assert num_frames >= len(SMEM_LIMITS) * 10
    for name, kernel in wheel.kernels.items():
        archs = kernel.static_smem.keys()
        assert archs >= SMEM_LIMITS.keys() - {"120"} or archs == {"90a"}, name  # of *_sm90a.cu


def test_every_kernel_bounds_its_block(wheel: Wheel) -> None:
    """So that ptxas keeps its registers within what a block of that size can have."""
    for path in toolchain.cuda_sources(ROOT / "cuda"):
        text = path.read_text()
        assert text.count("__global__") == len(re.findall(r"__global__ void\s+__launch_b", text))


def test_shared_memory_is_what_the_table_says_and_fits(wheel: Wheel) -> None:
    found, held = smem_table(wheel.kernels).splitlines(), TABLE.read_text().splitlines()
    changed = list(difflib.unified_diff(held, found, "smem_table.txt", "this build", n=0))
    assert not changed, "\n".join(changed)
    dynamic = {name for name, kernel in wheel.kernels.items() if kernel.dynamic_smem}
    for path in toolchain.cuda_sources(ROOT / "cuda"):
        if "extern __shared__" in path.read_text():
            declared = set(re.findall(r"\w+_kernel\b", path.read_text()))
            assert declared & {name.split("<")[0] for name in dynamic}, path.name


def test_launchers_ask_each_card_for_what_it_has(
    wheel: Wheel, launched: dict[str, set[str]]
) -> None:
    for arch, names in launched.items():
        for name in names:
            assert wheel.kernels[name].smem(arch) <= SMEM_LIMITS[arch], (arch, name)
    # No instance is for nobody, and none with dynamic shared memory escapes this test.
    dynamic = {name for name, kernel in wheel.kernels.items() if kernel.dynamic_smem}
    assert set().union(*launched.values()) >= dynamic


def test_a_kernel_of_one_card_stands_in_the_table_for_that_alone() -> None:
    hopper = Kernel({"90a": 1024}, 200 * 1024)
    every = Kernel(dict.fromkeys(reversed(CARDS), 2048))
    large = Kernel(dict.fromkeys(CARDS, 0), 100 * 1024)
    table = smem_table({"a": hopper, "b": every, "c": large}).splitlines()[3:]
    assert [line.split()[2:] for line in table] == [["90a", "a"], ["all", "b"], ["80,90a", "c"]]


def symbols(path: Path, which: str) -> dict[str, str]:
    """Dynamic symbols and nm's letters for them."""
    listed = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True)
    return {line.split()[-1]: line.split()[-2] for line in listed.stdout.splitlines()}


def test_ops_needs_nothing_but_torch_and_the_system(wheel: Wheel) -> None:
    needed = symbols(wheel.ops, "--undefined-only")
    assert needed["aoti_torch_get_current_cuda_stream"] == "w"
    of_torch = {name for name, letter in needed.items() if letter == "U" and "@" not in name}
    torch_lib = toolchain._package("torch") / "lib" / "libtorch_cpu.so"
    assert of_torch and of_torch <= symbols(torch_lib, "--defined-only").keys()
    own = symbols(wheel.ops, "--defined-only")
    assert not [name for name in own if re.search(r"\bcu[A-Z]|cuda[A-Z]|__cuda|pyserve", name)]
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
try:
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    torch.ops.pyserve.rms_norm.default.redispatch(cuda, x, torch.ones(64), 1e-6, out)
except RuntimeError as error:
    assert "rms_norm: x must be on a CUDA device" in str(error), error
else:
    raise AssertionError("a CUDA op took tensors of the CPU")
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
print([name for name in sys.argv[2:] if not has_kernel(f"pyserve::{name}", "CUDA")])
"""


def test_ops_loads_beside_this_torch_and_has_every_op_for_cuda(wheel: Wheel) -> None:
    if not set(toolchain.cpu_identity().split()) >= toolchain.PORTABLE_X86_FLAGS:
        pytest.skip("this CPU does not run the wheel")
    arguments = [sys.executable, "-c", LOAD, str(wheel.ops), *fakes.OP_NAMES]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


if __name__ == "__main__":
    with building() as build_of_this:
        TABLE.write_text(smem_table(build_of_this.finish().kernels))
    print(TABLE.read_text(), end="")
