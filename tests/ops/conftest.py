"""The native ops, without a way round: these tests are about them."""

from __future__ import annotations

import pytest

from pyserve.ops import build


@pytest.fixture(scope="session", autouse=True)
def native() -> None:
    assert build.load_native(allow_reference=False, progress=print) == "native"
