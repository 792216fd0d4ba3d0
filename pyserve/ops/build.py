"""Finds or compiles the native products, or registers their plain-torch twins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyserve.errors import BuildError
from pyserve.ops import fakes, reference

_loaded: list[str] = []
_libraries: list[torch.library.Library] = []


def load_native(*, allow_reference: bool, progress: Callable[[str], None]) -> str:
    """Make torch.ops.pyserve callable; "native" or "reference". Harmless when called again."""
    if not _loaded:
        if not allow_reference:
            raise BuildError("the native ops cannot be built: pass --allow-reference-ops")
        _register_reference()
        _loaded.append("reference")
    return _loaded[0]


def host() -> Any:
    """The `_host` module, or its twin."""
    return reference


def source_dir() -> Path:
    """Folder of the C++ sources: in an installed wheel, else in the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "cuda"


def _register_reference() -> None:
    library = torch.library.Library("pyserve", "DEF")
    text = (source_dir() / "ops.cpp").read_text(encoding="utf-8")
    for match in re.finditer(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text):
        schema = "".join(re.findall(r'"([^"]*)"', match[1]))
        library.define(schema)
        name = schema.split("(", 1)[0]
        library.impl(name, getattr(reference, name), "CPU")
    _libraries.append(library)
    fakes.register_fakes()
