"""pyserve with a fault built in: `python -m tests.gpu.broken_server FAULT TRIGGER [flags...]`.

The fault strikes in the first step that samples after the file TRIGGER has appeared. It sits in
ops.sample, behind the forward pass, as a fault of one of our own kernels would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyserve import cli, ops
from pyserve.engine.cuda_runner import CudaRunner

DEADLINE_S = 2.0
ENDLESS_CYCLES = 2 * 10**11  # 100 s at 2 GHz: for ever to a test, but the card comes back


def assert_on_device(logits: torch.Tensor) -> None:
    torch._assert_async(torch.zeros(1, dtype=torch.bool, device=logits.device))


def read_out_of_range(logits: torch.Tensor) -> None:
    logits.view(-1)[torch.tensor([2**40], device=logits.device)]


def never_end(logits: torch.Tensor) -> None:
    torch.cuda._sleep(ENDLESS_CYCLES)


FAULTS: dict[str, Callable[[torch.Tensor], None]] = {
    "assert": assert_on_device,
    "index": read_out_of_range,
    "hang": never_end,
}


def main() -> int:
    fault, trigger = FAULTS[sys.argv[1]], Path(sys.argv[2])
    sample = ops.sample

    def broken(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if trigger.exists():
            fault(logits)
        return sample(logits, *args, **kwargs)

    ops.sample = broken
    assert CudaRunner.__init__.__kwdefaults__ is not None
    CudaRunner.__init__.__kwdefaults__["step_deadline_s"] = DEADLINE_S
    return cli.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
