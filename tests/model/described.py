"""Changes of a ModelConfig that no config.json asks for."""

from __future__ import annotations

from msgspec.structs import replace

from pyserve.model.config import ModelConfig
from pyserve.model.layer_config import AttentionConfig


def with_windows(config: ModelConfig, *windows: int) -> ModelConfig:
    """`config` with a layer for each of these sliding windows, otherwise like its first one."""
    first = config.layers[0]
    return replace(
        config,
        layers=tuple(
            replace(first, attention=replace(first.attention, window=window)) for window in windows
        ),
    )


def attention_of(config: ModelConfig, index: int = 0) -> AttentionConfig:
    """Of a layer whose attention keeps keys and values."""
    attention = config.layers[index].attention
    assert isinstance(attention, AttentionConfig)
    return attention
