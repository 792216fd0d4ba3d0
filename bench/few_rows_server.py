"""The server, with kernels for another number of rows than it takes them for, and those that it
takes for none yet: of 4-bit integers for more than 16 rows on Hopper, what follows and norms as
factors in such products, and skinny_sm90a.cu, with norms as factors for as many rows.

    python -m bench.few_rows_server 64 --model /tmp/llama --device cuda

`bench.gpu_serve --few-rows 64` starts it in place of pyserve, to measure where they begin to lose.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from pyserve import cli, ops
from pyserve.ops import build, w4a16

MAX_SKINNY_ROWS = 128


def allow_rows(max_rows: int) -> None:
    """For this process; before a model is made, and in effect once the ops are loaded."""
    skinny_rows = min(max_rows, MAX_SKINNY_ROWS)
    ops.MAX_NORM_ROWS = max(ops.MAX_NORM_ROWS, skinny_rows)
    load_native = build.load_native

    def load(**kwargs: Any) -> build.Mode:
        mode = load_native(**kwargs)
        if torch.cuda.is_available():
            packed = torch.empty(1, 1, w4a16.unit_words(128), dtype=torch.int32, device="cuda")
            torch.ops.pyserve.try_linear_w4a16.default(packed, max_rows, 0)
            weight = torch.empty(8, 8, dtype=torch.bfloat16, device="cuda")
            torch.ops.pyserve.try_skinny.default(weight, skinny_rows, -1)
        return mode

    build.load_native = load


def main(argv: Sequence[str]) -> int:
    allow_rows(int(argv[0]))
    return cli.main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
