"""The server, with the kernel of few_rows.cuh for more rows of a linear than it is measured for.

    python -m bench.few_rows_server 16 --model /tmp/llama --device cuda

`bench.gpu_serve --few-rows 16` starts it in place of pyserve. Norms are factors up to as many rows.
It goes when cuda/gpu/linear/dispatch.cu knows who is the fastest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from pyserve import cli, ops
from pyserve.ops import build


def allow_rows(max_rows: int) -> None:
    """For this process; before a model is made, and in effect once the ops are loaded."""
    ops.MAX_NORM_ROWS = max_rows
    load_native = build.load_native

    def load(**kwargs: Any) -> build.Mode:
        mode = load_native(**kwargs)
        if torch.cuda.is_available():
            weight = torch.empty(8, 8, dtype=torch.bfloat16, device="cuda")
            torch.ops.pyserve.try_few_rows.default(weight, max_rows, 0)
        return mode

    build.load_native = load


def main(argv: Sequence[str]) -> int:
    allow_rows(int(argv[0]))
    return cli.main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
