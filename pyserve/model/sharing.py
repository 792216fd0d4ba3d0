"""Checks of how many tensor or pipeline parallel ranks can share a model."""

from __future__ import annotations

from pyserve.config import TP_SIZES
from pyserve.errors import ConfigError
from pyserve.model.config import ModelConfig


def tp_sizes(model: ModelConfig) -> list[int]:
    """The sizes in TP_SIZES by which the model's layers can be divided evenly."""
    return [
        size
        for size in TP_SIZES
        if model.num_heads % size == 0
        and all(width % size == 0 for width in model.widths)
        and (model.num_kv_heads % size == 0 or size % model.num_kv_heads == 0)
        and _are_groups_whole(model, size)
    ]


def check_sharing(model: ModelConfig, tp_size: int) -> None:
    """Raise ConfigError, naming the possible sizes, if tp_size ranks cannot share each layer."""
    if tp_size not in tp_sizes(model):
        raise ConfigError(
            f"--tensor-parallel-size {tp_size}: {model.num_heads} heads, {model.num_kv_heads} KV "
            f"heads and an intermediate size of {' and '.join(map(str, sorted(model.widths)))} can "
            f"be shared by {', '.join(map(str, tp_sizes(model)))} cards"
        )


def check_pipeline(model: ModelConfig, pp_size: int) -> None:
    """Raise ConfigError if some of pp_size ranks would have no layer."""
    if pp_size > len(model.layers):
        raise ConfigError(
            f"--pipeline-parallel-size {pp_size}: each rank has a layer at least, and the model's "
            f"are {len(model.layers)}"
        )


def _are_groups_whole(model: ModelConfig, tp_size: int) -> bool:
    """Whether ranks get whole quantisation groups of the matrices whose columns they divide."""
    if model.quantization is None or tp_size == 1:
        return True
    widths = set(model.widths)
    widths |= {layer.attention.joined_size for layer in model.layers}
    units = {width: model.quantization.unit_columns(width) for width in widths}
    return all(width % (tp_size * unit) == 0 for width, unit in units.items())
