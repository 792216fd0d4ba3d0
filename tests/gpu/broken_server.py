"""pyserve with a fault built in: `python -m tests.gpu.broken_server FAULT TRIGGER [flags...]`.

The fault strikes in the first step that samples after the file TRIGGER has appeared: on the stream
of the steps, between the forward pass and sampling, as a fault of one of our own kernels would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pyserve import cli
from pyserve.engine.batch import NOTHING_ASKED, Asked, StepShape
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.executor import StepExecutor

DEADLINE_S = 2.0
ENDLESS_CYCLES = 2 * 10**11  # 100 s at 2 GHz: for ever to a test, but the card comes back


def assert_on_device(device: torch.device) -> None:
    torch._assert_async(torch.zeros(1, dtype=torch.bool, device=device))


def read_out_of_range(device: torch.device) -> None:
    torch.zeros(8, device=device)[torch.tensor([2**40], device=device)]


def never_end(device: torch.device) -> None:
    torch.cuda._sleep(ENDLESS_CYCLES)


FAULTS: dict[str, Callable[[torch.device], None]] = {
    "assert": assert_on_device,
    "index": read_out_of_range,
    "hang": never_end,
}


def main() -> int:
    fault, trigger = FAULTS[sys.argv[1]], Path(sys.argv[2])
    sample = StepExecutor.sample

    def broken(
        self: StepExecutor, shape: StepShape, masked_rows: Sequence[int] = (),
        asked: Asked = NOTHING_ASKED,
    ) -> torch.Tensor:  # fmt: skip
        if trigger.exists():
            fault(self.device)
        return sample(self, shape, masked_rows, asked)

    StepExecutor.sample = broken  # type: ignore[method-assign]
    CudaRunner.step_deadline_s = DEADLINE_S
    return cli.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
