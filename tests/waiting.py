"""Waiting for what another thread, process or task does: the only place where tests poll.

The limit is in seconds, and far above what it takes: a machine may be busy and its disk slow. What
is counted in polls, or slept for once, fails there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

WAIT_S = 60.0

_T = TypeVar("_T")


def _nothing() -> object:
    return "condition not met"


def wait_until(
    condition: Callable[[], _T],
    timeout_s: float = WAIT_S,
    *,
    pause_s: float = 0.005,
    explain: Callable[[], object] = _nothing,
) -> _T:
    """What `condition` returns once that is true.

    Raises AssertionError with what `explain` says after `timeout_s`.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"after {timeout_s:g} s: {explain()}"
        time.sleep(pause_s)
    return found


async def until(
    condition: Callable[[], _T], timeout_s: float = WAIT_S, *, pause_s: float = 0.002
) -> _T:
    """As `wait_until`, on an event loop that goes on meanwhile."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"after {timeout_s:g} s: {_nothing()}"
        await asyncio.sleep(pause_s)
    return found
