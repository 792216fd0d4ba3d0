"""The native ops by their names: what the wrappers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _NativeOps:
    """torch.ops.pyserve.<name>.default, each looked up once."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.pyserve, name).default
        # OpOverload.__call__ is Python: 0.3 us of each call, and a step is mostly these calls.
        function: Callable[..., Any] = getattr(op, "_op", op)
        setattr(self, name, function)
        return function


native: Any = _NativeOps()
