"""Native ops (or their twins where there is no compiler) for every test of the engine."""

from __future__ import annotations

import pytest

from pyserve.ops import build
from tests.model.conftest import one_thread

__all__ = ["one_thread"]  # a fixture


@pytest.fixture(scope="session", autouse=True)
def native() -> str:
    return build.load_native(is_reference_allowed=True, progress=lambda line: None)
