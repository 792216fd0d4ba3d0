"""RopeConfig: which rotary embedding a model has, from the old and the new keys of config.json.

transformers 4 writes `rope_theta` at top level and `rope_scaling` with `rope_type` or `type`;
transformers 5 writes `rope_parameters` with everything in it. The tables are in layers/rotary.py.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import msgspec

from pyserve.errors import ConfigError
from pyserve.model.fields import Fields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]

ROPE_TABLES = ("rope_scaling", "rope_parameters")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_THETA = 10_000.0
MAX_THETA = 1e15
MAX_FACTOR = 65536.0
MAX_POSITION = 2**24


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding.

    theta             base of the frequencies.
    partial_rotary_factor
                      how much of each head is rotated, from its first dimension on.
    factor            how many times original_max_position the context is stretched.
    original_max_position
                      tokens the model was first trained on.
    low_freq_factor, high_freq_factor
                      llama3: bounds of the interpolated band, in turns over the original context.
    beta_fast, beta_slow, truncate
                      yarn: bounds of the ramp in turns, and whether it starts on whole dimensions.
    attention_factor  yarn: multiplies cos and sin.
    """

    type: RopeType
    theta: float
    original_max_position: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    partial_rotary_factor: float = 1.0


def rope_from_fields(
    config: Fields, max_position: int, *, layer_kind: str | None = None, has_partial: bool = False
) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the tokens of context it gives a model of `max_position`.

    layer_kind    whose table it is where there is one for each kind of layer; None: there is one.
    has_partial   whether partial_rotary_factor may be another than 1.

    Raises ConfigError for a type or a value that cannot be served, and for one that is said twice
    and differs: transformers 4 and 5 would each follow another one.
    """
    keys = [key for key in ROPE_TABLES if not config.is_empty(key)]
    tables = [_table(config, key, layer_kind) for key in keys] or [None]
    ropes = []
    for table in tables:
        factor = _partial_rotary_factor(config, table, has_partial)
        rope, max_model_len = _rope(config, table, max_position)
        rope = msgspec.structs.replace(rope, partial_rotary_factor=factor)
        ropes.append((rope, max_model_len))
    if ropes[0] != ropes[-1]:
        raise _contradiction(ropes[0][0], ropes[1][0])
    return ropes[0]


def _table(config: Fields, key: str, layer_kind: str | None) -> Fields | None:
    fields = config.table(key)
    nested = fields.tables()
    if nested and layer_kind is not None:
        return fields.table(layer_kind)
    if nested:
        raise config.refuse(key, f"must be one table for all layers, not one for {nested[0]}")
    return fields


def _partial_rotary_factor(config: Fields, rope: Fields | None, has_partial: bool) -> float:
    """From the table or the top level."""
    key, factors = "partial_rotary_factor", []
    for fields in (config, rope):
        if fields is not None:
            factor = fields.number(key, 0, 1, default=1.0, is_nullable=True)
            if factor != 1.0 and not has_partial:
                raise fields.refuse(key, "must be 1")
            if fields.has(key):
                factors.append(factor)
    if factors and rope is not None and factors[0] != factors[-1]:
        raise rope.refuse(key, f"contradicts the top level's {factors[0]:g}")
    return factors[0] if factors else 1.0


def _contradiction(scaling: RopeConfig, parameters: RopeConfig) -> ConfigError:
    name, one, other = next(
        (name, getattr(scaling, name), getattr(parameters, name))
        for name in RopeConfig.__struct_fields__
        if getattr(scaling, name) != getattr(parameters, name)
    )
    key = {"type": "rope_type", "theta": "rope_theta"}.get(name, name)
    return ConfigError(
        f"config.json: rope_scaling and rope_parameters disagree: {key} is {one} by the first and "
        f"{other} by the second; remove the one that is wrong"
    )


def _rope(config: Fields, rope: Fields | None, max_position: int) -> tuple[RopeConfig, int]:
    """As `rope_from_fields`, of one table."""
    theta = _theta(config, rope)
    kind = _rope_type(rope)
    if rope is None or kind == "default":
        if rope is not None and rope.number("factor", 0, 1e9, default=1.0, is_nullable=True) != 1.0:
            raise rope.refuse("factor", 'has no meaning with rope_type "default"')
        return (
            RopeConfig(type="default", theta=theta, original_max_position=max_position),
            max_position,
        )
    if kind == "llama3":
        # Its max_position_embeddings is the stretched context already.
        return _llama3(config, rope, theta, max_position), max_position
    if kind == "yarn":
        scaled = _yarn(config, rope, theta, max_position)
    else:
        scaled = RopeConfig(
            type=kind,
            theta=theta,
            original_max_position=max_position,
            factor=rope.number("factor", 1.0, MAX_FACTOR),
        )
    return scaled, int(scaled.original_max_position * scaled.factor)


def _theta(config: Fields, rope: Fields | None) -> float:
    """From the table or the top level."""
    sources = [fields for fields in (rope, config) if fields is not None]
    saying = (
        [fields for fields in sources if fields.has("rope_theta")]
        or [fields for fields in sources if fields.is_null("rope_theta")]
        or sources[-1:]
    )
    # Below 2 the frequencies hardly differ, and YaRN divides by the logarithm.
    thetas = [
        fields.number("rope_theta", 2.0, MAX_THETA, default=DEFAULT_THETA) for fields in saying
    ]
    if thetas[0] != thetas[-1]:
        raise saying[0].refuse("rope_theta", f"contradicts the top level's {thetas[-1]:g}")
    return thetas[0]


def _rope_type(rope: Fields | None) -> RopeType:
    if rope is None:
        return "default"
    key = "rope_type" if rope.has("rope_type") else "type"
    if not rope.has(key) and rope.has("factor"):
        raise rope.refuse("rope_type", f"must be one of {', '.join(ROPE_TYPES)}")
    kind = rope.string(key, default="default", is_nullable=True)
    if kind not in ROPE_TYPES:
        raise rope.refuse(key, f"must be one of {', '.join(ROPE_TYPES)}")
    if rope.has("type") and rope.string("type") != kind:
        raise rope.refuse("type", f"contradicts rope_type {kind}")
    return cast(RopeType, kind)


def _original_max_position(config: Fields, rope: Fields, max_position: int) -> int:
    """From the table or the top level, where Phi-3 and its kin have it."""
    key = "original_max_position_embeddings"
    saying = [fields for fields in (rope, config) if fields.has(key)] or [rope]
    lengths = [fields.integer(key, 1, MAX_POSITION, default=max_position) for fields in saying]
    if lengths[0] != lengths[-1]:
        raise rope.refuse(key, f"contradicts the top level's {lengths[-1]}")
    return lengths[0]


def _llama3(config: Fields, rope: Fields, theta: float, max_position: int) -> RopeConfig:
    low = rope.number("low_freq_factor", 1e-3, 1e6)
    high = rope.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        raise rope.refuse("high_freq_factor", f"must be above low_freq_factor ({low:g})")
    return RopeConfig(
        type="llama3",
        theta=theta,
        original_max_position=_original_max_position(config, rope, max_position),
        factor=rope.number("factor", 1.0, MAX_FACTOR),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(config: Fields, rope: Fields, theta: float, max_position: int) -> RopeConfig:
    original = _original_max_position(config, rope, max_position)
    factor = rope.number(
        "factor", 1.0, MAX_FACTOR, default=max_position / original, is_nullable=True
    )
    attention_factor = _mscale(factor, 1.0)
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor", 0.0, 1e3)
    elif rope.has("mscale") and rope.has("mscale_all_dim"):
        mscale = rope.number("mscale", 0.0, 1e3)
        mscale_all_dim = rope.number("mscale_all_dim", 0.0, 1e3)
        if mscale and mscale_all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    beta_fast = rope.number("beta_fast", 0.0, 1e6, default=32.0, is_nullable=True) or 32.0
    beta_slow = rope.number("beta_slow", 0.0, 1e6, default=1.0, is_nullable=True) or 1.0
    if beta_fast < beta_slow:
        raise rope.refuse("beta_fast", f"must be at least beta_slow ({beta_slow:g})")
    return RopeConfig(
        type="yarn",
        theta=theta,
        original_max_position=original,
        factor=factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.boolean("truncate", default=True),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
