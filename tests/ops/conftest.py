"""The native ops, without a way round: these tests are about them.

With the address and undefined behaviour sanitizers (test_build.py needs no such run):

    PYSERVE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \\
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) \\
    $(g++ -print-file-name=libstdc++.so)" \\
    python -m pytest tests/ops --ignore tests/ops/test_build.py
"""

from __future__ import annotations

import pytest

from pyserve.ops import build


@pytest.fixture(scope="session", autouse=True)
def native() -> None:
    assert build.load_native(allow_reference=False, progress=print) == "native"
