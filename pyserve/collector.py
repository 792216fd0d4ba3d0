"""Python's garbage collector, kept from work that it would only hold up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Nothing is collected meanwhile, on any thread."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def imports() -> Iterator[None]:
    """While large modules are imported: a tenth of that time would go into collections, which find
    next to nothing. What is there at the end lives as long as the process, and is never looked at
    again.
    """
    with paused():
        yield
        gc.freeze()
