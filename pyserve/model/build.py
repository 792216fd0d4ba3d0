"""build_model: the only function that makes a model from its ModelConfig."""

from __future__ import annotations

from dataclasses import replace

from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.placement import Placement


def build_model(
    config: ModelConfig, placement: Placement, *, max_model_len: int | None = None
) -> Decoder:
    """Make the model with parameters that are allocated but not filled; see loader.py.

    On the meta device it has shapes and no memory.

    max_model_len  number of positions, and so of rows of the rope tables; None: all that the model
                   supports.
    """
    placement = replace(placement, quantization=config.quantization)
    return Decoder(config, placement, max_model_len=max_model_len)
