"""Steps that no request asked for: they make a device ready for every shape that can come.

They start from reset slots, and all rows are made of token 0 and block 0: what they write is read
by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyserve.engine.batch import Step, padded_size
from pyserve.engine.state import StepLimits


def largest_step(limits: StepLimits) -> Step:
    """The step with the most tokens, rows and samples."""
    return _step(limits, limits.max_num_batched_tokens)


def warmup_steps(limits: StepLimits) -> Iterator[Step]:
    """A step of every padded number of tokens, the largest first."""
    num_tokens = limits.max_num_batched_tokens
    while num_tokens > 0:
        yield _step(limits, num_tokens)
        num_tokens = _next_smaller(num_tokens, limits.max_num_batched_tokens)


def _next_smaller(num_tokens: int, limit: int) -> int:
    """The next smaller number of tokens that is a padded size; 0 after the smallest."""
    smaller = num_tokens - 1
    while smaller > 0 and padded_size(smaller, limit) == num_tokens:
        smaller -= 1
    return smaller


def _step(limits: StepLimits, num_tokens: int) -> Step:
    """Up to `num_tokens` tokens in as many rows as there may be, all of them sampled."""
    num_rows = min(num_tokens, limits.num_slots)
    share, rest = divmod(num_tokens, num_rows)
    query_lens = [min(share + (row < rest), limits.max_model_len) for row in range(num_rows)]
    return Step(
        row_slots=list(range(num_rows)),
        query_lens=query_lens,
        host_tokens=[[0] * query_len for query_len in query_lens],
        row_samples=[True] * num_rows,
        num_tokens=sum(query_lens),
    )
