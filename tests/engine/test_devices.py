"""Which device serves, and what a card refuses, without a card."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyserve.engine import devices
from pyserve.engine.devices import (
    check_logprobs_mode,
    check_model,
    describe,
    resolve_device,
    resolve_dtype,
)
from pyserve.errors import ConfigError, StartupError
from pyserve.model.config import ModelConfig
from pyserve.ops import cuda_card
from tests.engine.tiny import CONFIG

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def usable(index: int) -> None:
    pass


def unusable(index: int) -> None:
    raise StartupError("the NVIDIA driver is too old: update it")


def unusable_with_a_remedy(index: int) -> None:
    raise StartupError("no NVIDIA card: get one, or pass --device cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    def make(*, has_card: bool, check: Callable[[int], None], has_driver: bool = False) -> None:
        monkeypatch.setattr(cuda_card, "has_card", lambda: has_card)
        monkeypatch.setattr(cuda_card, "check_cuda", check)
        (tmp_path / "driver").write_text("") if has_driver else None
        monkeypatch.setattr(devices, "DRIVER_VERSION", tmp_path / "driver")

    return make


def test_auto_takes_a_card_that_works(machine: Callable[..., None]) -> None:
    machine(has_card=True, check=usable)
    assert resolve_device("auto", is_demo=False) == CUDA
    assert resolve_device("cuda", is_demo=False) == CUDA
    assert resolve_device("cpu", is_demo=False) == CPU


@pytest.mark.parametrize("has_card", [True, False])
@pytest.mark.parametrize("check", [unusable, unusable_with_a_remedy])
def test_a_card_that_does_not_work_is_an_error(
    machine: Callable[..., None], has_card: bool, check: Callable[[int], None]
) -> None:
    machine(has_card=has_card, check=check, has_driver=not has_card)
    with pytest.raises(StartupError) as caught:
        resolve_device("auto", is_demo=True)
    assert str(caught.value).count("--device cpu") == 1
    assert len(str(caught.value).splitlines()) == 1
    assert resolve_device("cpu", is_demo=True) == CPU


@pytest.mark.parametrize(("is_demo", "level"), [(True, logging.INFO), (False, logging.WARNING)])
def test_no_card(
    machine: Callable[..., None], caplog: pytest.LogCaptureFixture, is_demo: bool, level: int
) -> None:
    machine(has_card=False, check=unusable_with_a_remedy)
    with caplog.at_level(logging.INFO, "pyserve"):
        assert resolve_device("auto", is_demo=is_demo) == CPU
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (level, "no NVIDIA card found: serving on the CPU")
    ]
    with pytest.raises(StartupError, match="no NVIDIA card"):
        resolve_device("cuda", is_demo=is_demo)


def test_a_card_that_takes_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    with pytest.raises(StartupError) as caught:
        devices.card_memory(CUDA)
    message = str(caught.value)
    assert message.startswith("Card 1 takes no work (CUDA error: out of memory): other processes")
    assert "nvidia-smi" in message and "\n" not in message


def test_head_dims() -> None:
    for head_dim in (16, 64, 80, 96, 128, 256):
        model = ModelConfig.from_hf(CONFIG | {"head_dim": head_dim})
        check_model(model, CPU)
        if head_dim in (64, 96, 128, 256):
            check_model(model, CUDA)
        else:
            with pytest.raises(ConfigError, match=f"head_dim {head_dim}: served on the CPU only"):
                check_model(model, CUDA)


def test_dtypes_of_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_dtype("auto", "float32", CPU) == torch.float32
    assert resolve_dtype("auto", "bfloat16", CPU) == torch.bfloat16
    assert resolve_dtype("bfloat16", "float32", CPU) == torch.bfloat16
    assert resolve_dtype("float32", "float16", CPU) == torch.float32
    assert not caplog.records
    with caplog.at_level(logging.INFO, "pyserve"):
        assert resolve_dtype("auto", "float16", CPU) == torch.float32
    assert "float16" in caplog.text
    with pytest.raises(ConfigError, match="--dtype float16"):
        resolve_dtype("float16", "float32", CPU)


def test_dtypes_of_a_card(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_dtype("auto", "bfloat16", CUDA) == torch.bfloat16
    assert resolve_dtype("auto", "float16", CUDA) == torch.float16
    assert resolve_dtype("bfloat16", "float32", CUDA) == torch.bfloat16
    assert resolve_dtype("float16", "bfloat16", CUDA) == torch.float16
    assert not caplog.records
    with caplog.at_level(logging.INFO, "pyserve"):
        assert resolve_dtype("auto", "float32", CUDA) == torch.bfloat16
    assert "computing in bfloat16" in caplog.text
    with pytest.raises(ConfigError, match="--dtype float32 .* --device cpu"):
        resolve_dtype("float32", "float32", CUDA)


def test_the_log_says_what_a_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 1")
    monkeypatch.setattr(cuda_card, "capability", lambda index: (8, 9))
    assert describe(CPU) == "cpu"
    assert describe(CUDA) == "cuda (Card 1, compute capability 8.9)"


def test_a_card_refuses_processed_logprobs_by_name() -> None:
    check_logprobs_mode("processed_logits", CPU)
    check_logprobs_mode("raw_logits", CUDA)
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs is not built yet"):
        check_logprobs_mode("processed_logprobs", CUDA)
