"""Ops for the decoder: the native ones, or their twins where there is no compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyserve.ops import build


@pytest.fixture(scope="session", autouse=True)
def ops() -> None:
    build.load_native(is_reference_allowed=True, progress=print)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(before)
