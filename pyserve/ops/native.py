"""`native`: the native ops as attributes; only the wrappers call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _NativeOps:
    """Gives torch.ops.pyserve.<name>.default as attribute <name>; each is looked up only once."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.pyserve, name).default
        # OpOverload.__call__ is Python and would add 0.3 us to each call.
        function: Callable[..., Any] = getattr(op, "_op", op)
        setattr(self, name, function)
        return function


native: Any = _NativeOps()
