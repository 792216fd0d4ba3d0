"""Reasons why an NVIDIA card cannot be used, each one line; torch's part is put on."""

from __future__ import annotations

import re

import pytest
import torch

from pyserve.errors import StartupError
from pyserve.ops import cuda_card


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with CUDA 12.6 and an A100; the tests take parts of it away."""
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(cuda_card, "driver_version", lambda: (12, 6))
    monkeypatch.setattr(cuda_card, "has_card", lambda: True)


def reason() -> str:
    with pytest.raises(StartupError) as error:
        cuda_card.check_cuda()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_card_that_will_do() -> None:
    cuda_card.check_cuda()
    assert cuda_card.capability() == (8, 0)


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert reason().startswith("an NVIDIA card is here, but torch ")
    assert "built without CUDA: install PyTorch's build for CUDA" in reason()
    monkeypatch.setattr(cuda_card, "has_card", lambda: False)
    assert reason().startswith("--device cuda needs an NVIDIA card, but torch ")


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update",
            "the NVIDIA driver is too old for torch .*: update .* shows CUDA 12.6 or later",
        ),
        (
            "The NVIDIA driver on your system is too old (found version 12080). Please update",
            "too old for torch .*: install PyTorch's build for CUDA 12.6 .*, or update the NVIDIA",
        ),
        (
            "Found no NVIDIA driver on your system. Please check that you\nhave",
            "its driver is not .torch: Found no NVIDIA driver on your system.: in a container",
        ),
        ("No CUDA GPUs are available", "no NVIDIA card is visible: see nvidia-smi and CUDA_VIS"),
        (
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet\ninitialized",
            "CUDA does not start: .*802: system not yet initialized; see nvidia-smi",
        ),
    ],
)
def test_cuda_does_not_start(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    def init() -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "init", init)
    assert re.search(expected, reason())


def test_a_card_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert "compute capability 7.5: 8.0 or later is needed" in reason()


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_card, "driver_version", lambda: (12, 4))
    assert reason().startswith("the NVIDIA driver supports CUDA 12.4: update the NVIDIA driver")


def test_no_such_card() -> None:
    with pytest.raises(StartupError, match="--device cuda:1: this machine has 1 usable NVIDIA"):
        cuda_card.check_cuda(1)
