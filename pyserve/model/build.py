"""build_model: the one place where a model is made from its description."""

from __future__ import annotations

from dataclasses import replace

from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.placement import Placement


def build_model(
    config: ModelConfig, placement: Placement, *, max_model_len: int | None = None
) -> Decoder:
    """The model with its parameters allocated, not filled; on "meta", shapes without memory.

    max_model_len bounds the positions that may come: the rope tables have a row for each. None:
    all that the model supports. An architecture that is another algorithm, not another
    description, is another class here.
    """
    placement = replace(placement, quantization=config.quantization)
    return Decoder(config, placement, max_model_len=max_model_len)
