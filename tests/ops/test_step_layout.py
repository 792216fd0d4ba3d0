"""step_layout.py and cuda/common/step.h say the same."""

from __future__ import annotations

import re

from pyserve.ops import build, step_layout


def test_python_and_cpp_agree() -> None:
    cpp = build.host().step_layout()
    python = {
        name: value
        for name, value in vars(step_layout).items()
        if name.isupper() and isinstance(value, int)
    }
    assert {_screaming(name): value for name, value in cpp.items()} == python


def _screaming(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name.removeprefix("k")).upper()
