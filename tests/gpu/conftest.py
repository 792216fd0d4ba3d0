"""Tests on an NVIDIA card: all of this folder has the marker gpu, and skips where there is none.

A CUDA error ends every later test of its process: bench/gpu_check.sh runs a process per file.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from pyserve.ops import build

HERE = Path(__file__).parent


def has_cuda() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where a driver is missing or old
        return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None if has_cuda() else pytest.mark.skip(reason="torch sees no NVIDIA card here")
    if skip is None:  # these first: who loads the ops first decides whether CUDA is in them
        items.sort(key=lambda item: HERE not in item.path.parents)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if skip is not None:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def native_ops() -> None:
    """The compiled ops with their CUDA part; compiles them where nobody has."""
    build.load_native(is_reference_allowed=False, progress=print, device="cuda")


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws is the same in each run, so that one that fails can be run again."""
    torch.manual_seed(0)
