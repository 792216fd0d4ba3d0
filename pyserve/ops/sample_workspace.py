"""Size of the scratch memory that `sample` needs on CUDA.

The layout is in cuda/gpu/sample/sample.h; the op checks a workspace's size against
sample_workspace_words there.
"""

from __future__ import annotations

import torch

_MAX_SPLITS = 32  # most CTAs that share a row
_NUM_PARTS = 1024  # parts of a row, for each of which the maximum is stored
_ROW_WORDS = _MAX_SPLITS + 2 + _NUM_PARTS // 2
_MAX_SPLIT_ROWS = 128  # with more rows, each has a single CTA, whose list is in shared memory
_MIN_LIST_WORDS, _MAX_LIST_WORDS = 2248, 4096


def sample_workspace_words(num_rows: int, vocab_size: int) -> int:
    """The number of 64-bit words that `sample` needs for up to num_rows rows."""
    list_words = min(max(vocab_size, _MIN_LIST_WORDS), _MAX_LIST_WORDS)
    return num_rows * _ROW_WORDS + min(num_rows, _MAX_SPLIT_ROWS) * list_words


def allocate(max_num_rows: int, vocab_size: int, *, device: torch.device) -> torch.Tensor:
    """Allocate an int64 workspace for up to max_num_rows rows. It needs no initialisation, and
    nothing in it is used by a later call."""
    num_words = sample_workspace_words(max_num_rows, vocab_size)
    return torch.empty(num_words, dtype=torch.int64, device=device)
