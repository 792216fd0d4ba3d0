"""The NVIDIA card: whether torch can use it, its compute capability, and its driver's CUDA version.

If it cannot be used, a StartupError says why and what to do, in one line. These calls create no
CUDA context, so they take no memory on the card.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

from pyserve.errors import StartupError
from pyserve.ops.nvcc import MIN_CUDA, dotted

MIN_CAPABILITY = (8, 0)  # Ampere: bfloat16, cp.async, 16-bit mma.sync of shape m16n8k16
_UPDATE_DRIVER = "update the NVIDIA driver, or rent a machine whose nvidia-smi shows CUDA"


def has_card() -> bool:
    """Whether the system shows an NVIDIA card, even if torch cannot use it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # Linux; WSL


def check_cuda(index: int = 0) -> None:
    """Raise StartupError unless torch and our kernels can run on card `index`."""
    if torch.version.cuda is None:
        card = "an NVIDIA card is here" if has_card() else "--device cuda needs an NVIDIA card"
        raise StartupError(
            f"{card}, but torch {torch.__version__} is built without CUDA: "
            "install PyTorch's build for CUDA (https://pytorch.org), or pass --device cpu"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise StartupError(_init_failure(str(error))) from error
    count = torch.cuda.device_count()
    if index >= count:
        raise StartupError(f"--device cuda:{index}: this machine has {count} usable NVIDIA card(s)")
    found = capability(index)
    if found < MIN_CAPABILITY:
        raise StartupError(
            f"{torch.cuda.get_device_name(index)} has compute capability {dotted(found)}: "
            f"{dotted(MIN_CAPABILITY)} or later is needed (A100, RTX 30 and newer), "
            "or pass --device cpu"
        )
    driver = driver_version()
    if driver < MIN_CUDA:
        raise StartupError(
            f"the NVIDIA driver supports CUDA {dotted(driver)}: "
            f"{_UPDATE_DRIVER} {dotted(MIN_CUDA)} or later"
        )


def capability(index: int = 0) -> tuple[int, int]:
    """Compute capability of card `index`, as (9, 0); check_cuda must have passed for it."""
    return torch.cuda.get_device_capability(index)


def driver_version() -> tuple[int, int]:
    """The newest CUDA version that the driver supports, as (12, 8); check_cuda must have passed."""
    number = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def _init_failure(text: str) -> str:
    """A one-line message with a remedy, from torch's error message when CUDA does not start."""
    reason = " ".join(text.split())
    if "driver" in reason and "too old" in reason:
        found = re.search(r"found version (\d+)", reason)
        driver = (int(found[1]) // 1000, int(found[1]) % 1000 // 10) if found else (0, 0)
        other_torch = ""
        if driver >= MIN_CUDA:  # new enough for us, and for an older build of torch
            other_torch = f"install PyTorch's build for CUDA {dotted(MIN_CUDA)} (pytorch.org), or "
        return (
            f"the NVIDIA driver is too old for torch {torch.__version__}: {other_torch}"
            f"{_UPDATE_DRIVER} {torch.version.cuda} or later"
        )
    if "no NVIDIA driver" in reason:
        where = "an NVIDIA card is here, but its driver is not" if has_card() else "no NVIDIA card"
        return (
            f"{where} (torch: {reason.partition('.')[0]}): in a container pass --gpus all; "
            "else install the driver, or pass --device cpu"
        )
    if "No CUDA GPUs" in reason:
        return "no NVIDIA card is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return f"CUDA does not start: {reason.partition(' Compile with')[0]}; see nvidia-smi"
