"""The server, with the kernels of few_rows.cuh and few_rows_w4a16.cuh for more rows of a linear
than they are measured for: the latter, of 4-bit integers, for none yet.

    python -m bench.few_rows_server 16 --model /tmp/llama --device cuda

`bench.gpu_serve --few-rows 16` starts it in place of pyserve. Norms are factors up to as many rows.
8 rows change nothing but the products with 4-bit integers.
It goes when cuda/gpu/linear/dispatch.cu and dispatch.h know who is the fastest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from pyserve import cli, ops
from pyserve.ops import build, w4a16

MAX_W4A16_ROWS = 16


def allow_rows(max_rows: int) -> None:
    """For this process; before a model is made, and in effect once the ops are loaded."""
    ops.MAX_NORM_ROWS = max_rows
    load_native = build.load_native

    def load(**kwargs: Any) -> build.Mode:
        mode = load_native(**kwargs)
        if torch.cuda.is_available():
            weight = torch.empty(8, 8, dtype=torch.bfloat16, device="cuda")
            torch.ops.pyserve.try_few_rows.default(weight, max_rows, 0)
            packed = torch.empty(1, 1, w4a16.unit_words(128), dtype=torch.int32, device="cuda")
            torch.ops.pyserve.try_linear_w4a16.default(packed, min(max_rows, MAX_W4A16_ROWS))
        return mode

    build.load_native = load


def main(argv: Sequence[str]) -> int:
    allow_rows(int(argv[0]))
    return cli.main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
