"""The checks of a packed StepInput in the plain-torch twin of plan_step."""

from __future__ import annotations

import torch
from torch import Tensor

from pyserve.ops import step_layout as layout


def require(condition: bool, what: str) -> None:
    """Raise RuntimeError naming `what` unless `condition` holds."""
    if not condition:
        raise RuntimeError(f"plan_step: bad step input: {what}")


def checked_header(words: list[int], max_num_tokens: int, max_num_rows: int) -> list[int]:
    """Return the header, after checking that its counts and offsets are within the buffer.

    Raises RuntimeError.
    """
    require(len(words) >= layout.HEADER_WORDS, f"{len(words)} words")
    header = words[: layout.HEADER_WORDS]
    require(header[layout.HEADER_MAGIC] == layout.STEP_MAGIC, "magic")
    num_words = header[layout.HEADER_NUM_WORDS]
    require(layout.HEADER_WORDS <= num_words <= len(words), "num_words")
    num_rows, num_tokens = header[layout.HEADER_NUM_ROWS], header[layout.HEADER_NUM_TOKENS]
    require(0 <= num_rows <= max_num_rows, f"{num_rows} rows, room for {max_num_rows}")
    require(0 <= num_tokens <= max_num_tokens, f"{num_tokens} tokens, room for {max_num_tokens}")
    require(0 <= header[layout.HEADER_NUM_SAMPLES] <= num_rows, "num_samples")
    sections = (
        (layout.HEADER_ROWS_OFFSET, num_rows * layout.ROW_WORDS),
        (layout.HEADER_TOKENS_OFFSET, 0),
        (
            layout.HEADER_BLOCK_UPDATES_OFFSET,
            header[layout.HEADER_NUM_BLOCK_UPDATES] * layout.BLOCK_UPDATE_WORDS,
        ),
        (
            layout.HEADER_SLOT_UPDATES_OFFSET,
            header[layout.HEADER_NUM_SLOT_UPDATES] * layout.SLOT_UPDATE_WORDS,
        ),
    )
    end = layout.HEADER_WORDS
    for offset_word, size in sections:
        require(end <= header[offset_word] <= num_words - size and size >= 0, "section")
        end = header[offset_word] + size
    return header


def check_sampling(row: Tensor, bias_values: Tensor) -> None:
    """Check the float parameters of a slot update. Raises RuntimeError for one out of range.

    row          int32 [SLOT_HEADER_WORDS]: the header of the slot row.
    bias_values  int32 [num_bias]: the bits of float32 logit biases.
    """
    real = row.view(torch.float32)
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for name, word, low, high in (
        ("temperature", layout.SLOT_TEMPERATURE, 0.0, huge),
        ("top_p", layout.SLOT_TOP_P, tiny, 1.0),
        ("min_p", layout.SLOT_MIN_P, 0.0, 1.0),
        ("repetition penalty", layout.SLOT_REPETITION_PENALTY, tiny, huge),
        ("presence penalty", layout.SLOT_PRESENCE_PENALTY, -huge, huge),
        ("frequency penalty", layout.SLOT_FREQUENCY_PENALTY, -huge, huge),
    ):
        require(low <= float(real[word]) <= high, f"{name} {float(real[word])}")
    require(int(row[layout.SLOT_TOP_K]) >= 0, "top_k")
    require(bool(bias_values.view(torch.float32).isfinite().all()), "logit bias")
