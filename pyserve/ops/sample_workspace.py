"""Size of the scratch memory that `sample` needs on CUDA."""

from __future__ import annotations

import torch


def allocate(max_num_rows: int, vocab_size: int, *, device: torch.device) -> torch.Tensor:
    """float32 workspace for up to max_num_rows rows. (The sampling author fills in the size.)"""
    raise NotImplementedError
