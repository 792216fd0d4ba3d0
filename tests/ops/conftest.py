"""The native ops, without a way round: these tests are about them.

With the address and undefined behaviour sanitizers (test_build.py and test_toolchain.py need no
such run; the first test waits for all to be compiled, which takes minutes):

    PYSERVE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \\
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) \\
    $(g++ -print-file-name=libstdc++.so)" \\
    python -m pytest tests/ops -o timeout=1800 --ignore tests/ops/test_build.py \\
    --ignore tests/ops/test_toolchain.py
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from pyserve.ops import build, build_cache, toolchain
from tests.model.conftest import one_thread
from tests.ops import cuda_wheel
from tests.ops.fake_compiler import FAKE_COMPILER

__all__ = ["one_thread"]  # a fixture

CUDA_BUILD = Path(__file__).with_name("test_cuda_build.py")


@pytest.fixture(scope="session", autouse=True)
def native() -> None:
    assert build.load_native(is_reference_allowed=False, progress=print) == "native"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path == CUDA_BUILD)  # last: see cuda_wheel.py


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    is_wanted = any(item.path == CUDA_BUILD for item in session.items)
    if not is_wanted or session.config.option.collectonly or not cuda_wheel.can_build():
        return (yield)
    with cuda_wheel.building() as running:
        session.config.stash[cuda_wheel.STASH_KEY] = running
        return (yield)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fake compiler in force and an empty cache, looked at often."""
    monkeypatch.setattr(toolchain, "TICK_S", 0.05)
    monkeypatch.setattr(build_cache, "WAIT_POLL_S", 0.05)
    compiler = tmp_path / "c++"
    compiler.write_text(FAKE_COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYSERVE_SANITIZE", "1")  # products in the package are not looked at
    return tmp_path
