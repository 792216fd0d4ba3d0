"""What all tests are spared."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Thousands of tests and what they import are never garbage, and looking through them for some
    takes a second each time."""
    gc.collect()
    gc.freeze()
