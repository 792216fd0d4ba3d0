"""Size of the scratch memory that `sample` needs on CUDA.

The layout is in cuda/gpu/sample/sample.h, whose sample_workspace_words the op checks a workspace
against.
"""

from __future__ import annotations

import torch

_MAX_SPLITS = 32  # CTAs that share a row
_NUM_PARTS = 1024  # parts of a row whose maxima are kept
_ROW_WORDS = _MAX_SPLITS + 2 + _NUM_PARTS // 2
_MAX_SPLIT_ROWS = 128  # with more rows each has one CTA, which keeps its list in shared memory
_MIN_LIST_WORDS, _MAX_LIST_WORDS = 2248, 4096


def sample_workspace_words(num_rows: int, vocab_size: int) -> int:
    """64-bit words that `sample` of up to num_rows rows needs."""
    list_words = min(max(vocab_size, _MIN_LIST_WORDS), _MAX_LIST_WORDS)
    return num_rows * _ROW_WORDS + min(num_rows, _MAX_SPLIT_ROWS) * list_words


def allocate(max_num_rows: int, vocab_size: int, *, device: torch.device) -> torch.Tensor:
    """int64 workspace for up to max_num_rows rows; its content matters to no later call."""
    num_words = sample_workspace_words(max_num_rows, vocab_size)
    return torch.empty(num_words, dtype=torch.int64, device=device)
