"""Native ops (or their twins where there is no compiler) for every test of the engine."""

from __future__ import annotations

import pytest

from pyserve.ops import build


@pytest.fixture(scope="session", autouse=True)
def native() -> str:
    return build.load_native(is_reference_allowed=True, progress=lambda line: None)
