"""limits.py says what the ops themselves say: they take so much, and refuse the next more."""

from __future__ import annotations

import pytest
import torch

from pyserve import limits
from pyserve.ops import step_layout as layout


def attend(*, head_dim: int, group: int) -> None:
    """One token that sees itself."""
    q = torch.randn(1, group, head_dim)
    cache = torch.randn(2, 1, 16, 1, head_dim)
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    torch.ops.pyserve.paged_attention(
        q, cache[0], cache[1], torch.zeros(1, 1, dtype=torch.int32), zero,
        torch.tensor([0, 1], dtype=torch.int32), one, 1.0, 0, 1, None, None, torch.empty_like(q),
    )  # fmt: skip


def sample(*, vocab_size: int) -> None:
    """Greedily, by a slot that is all zero."""
    zero = torch.zeros(1, dtype=torch.int32)
    torch.ops.pyserve.sample(
        torch.randn(1, vocab_size), zero, torch.zeros(1, layout.SLOT_WORDS, dtype=torch.int32),
        torch.zeros(1, vocab_size, dtype=torch.int16), None, zero.clone(),
    )  # fmt: skip


def test_attention_takes_what_a_model_may_have() -> None:
    attend(head_dim=limits.MAX_HEAD_DIM, group=limits.MAX_GROUP)
    for head_dim in limits.CUDA_HEAD_DIMS:
        assert head_dim % limits.HEAD_DIM_STEP == 0 and head_dim <= limits.MAX_HEAD_DIM
    for head_dim in (limits.MAX_HEAD_DIM + limits.HEAD_DIM_STEP, limits.HEAD_DIM_STEP + 1):
        with pytest.raises(RuntimeError, match="is not a multiple of 8 up to 256"):
            attend(head_dim=head_dim, group=1)


def test_sampling_takes_what_a_model_may_have() -> None:
    sample(vocab_size=limits.MAX_VOCAB_SIZE)
    with pytest.raises(RuntimeError, match="at most 524288"):
        sample(vocab_size=limits.MAX_VOCAB_SIZE + 1)
