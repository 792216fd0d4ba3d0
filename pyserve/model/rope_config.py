"""RopeConfig: the rotary embedding of a model, read from the old and the new keys of config.json.

transformers 4 writes `rope_theta` at top level and `rope_scaling` with `rope_type` or `type`;
transformers 5 writes `rope_parameters` with everything in it. The tables are in layers/rotary.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from pyserve.errors import ConfigError
from pyserve.model.fields import Fields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

ROPE_TABLES = ("rope_scaling", "rope_parameters")
ROPE_TYPES: Mapping[str, RopeType] = {
    "default": "default", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3",
    "yarn": "yarn", "longrope": "longrope",
}  # fmt: skip
# Those whose tables say original_max_position_embeddings, which the scale of queries needs too.
TYPES_WITH_ORIGINAL: tuple[RopeType, ...] = ("llama3", "yarn", "longrope")
QUERY_BETA = "llama_4_scaling_beta"
DEFAULT_THETA = 10_000.0
MAX_THETA = 1e15
MAX_FACTOR = 65536.0
MAX_POSITION = 2**24


class RopeKeys(msgspec.Struct, frozen=True, kw_only=True):
    """How config.json of a family describes the rotary embedding.

    types         name in config.json -> type, for the types that the family may have.
    has_partial   partial_rotary_factor may differ from 1.
    default_partial
                  partial_rotary_factor if the key is absent.
    has_query_scale
                  llama_4_scaling_beta is read.
    has_kinds     rope_parameters holds one table for each kind of layer. In older files
                  rope_scaling applies to layers without a window, and windowed layers have their
                  own theta, rope_local_base_freq.
    default_table rope_parameters if config.json has no table; None: no scaling.
    default_theta rope_theta if the key is absent.
    local_theta   rope_local_base_freq if the key is absent.
    """

    types: Mapping[str, RopeType] = msgspec.field(default_factory=lambda: ROPE_TYPES)
    has_partial: bool = False
    default_partial: float = 1.0
    has_query_scale: bool = False
    has_kinds: bool = False
    default_table: Mapping[str, object] | None = None
    default_theta: float = DEFAULT_THETA
    local_theta: float = DEFAULT_THETA


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding and its context extension.

    theta             base of the frequencies.
    original_max_position
                      context in tokens that the model was first trained with.
    factor            the context is extended to factor * original_max_position.
    low_freq_factor, high_freq_factor
                      llama3: bounds of the interpolated band, in turns over the original context.
    beta_fast, beta_slow, truncate
                      yarn: bounds of the ramp in turns over the original context, and whether they
                      are rounded to whole dimensions.
    attention_factor  yarn and longrope: factor of cos and sin.
    latent_factor     yarn: factor of the softmax scale of latent attention, from mscale_all_dim.
    short_factors, long_factors
                      longrope: divisors of the frequencies; the short ones apply if the server's
                      max_model_len is at most original_max_position, else the long ones.
    query_beta        q is multiplied by 1 + beta * ln(1 + position // original_max_position).
    partial_rotary_factor
                      the part of each head that is rotated, from its first dimension on.
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
    latent_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_beta: float = 0.0
    partial_rotary_factor: float = 1.0

    def is_long(self, max_model_len: int) -> bool:
        """Whether a server with this max_model_len exceeds the model's original context.

        Then long_factors are used even for short prompts, because cached keys cannot be rotated
        again when a sequence grows beyond the original context.
        """
        return max_model_len > self.original_max_position

    def choice(self, max_model_len: int) -> str | None:
        """A line for the log if max_model_len decides between factors (longrope), else None."""
        if self.type != "longrope":
            return None
        original = self.original_max_position
        if self.is_long(max_model_len):
            return (
                f"longrope: long_factor for all prompts, as the context of {max_model_len} tokens "
                f"is above {original}; --max-model-len {original} takes short_factor"
            )
        return (
            f"longrope: short_factor, as the context of {max_model_len} tokens is not above "
            f"{original}"
        )


def rope_from_fields(
    config: Fields, max_position: int, row: RopeKeys, *, is_windowed: bool = False
) -> tuple[RopeConfig, int]:
    """Read the rotary embedding; also returns the tokens of context that it supports.

    max_position  max_position_embeddings of config.json.
    is_windowed   read that of layers with a sliding window, if row.has_kinds.

    Raises ConfigError for a type or value that is not supported, and for a value that is given
    twice with different values, as transformers 4 and 5 would each use another one.
    """
    keys = [key for key in ROPE_TABLES if not config.is_empty(key)]
    if is_windowed and row.has_kinds:
        keys = [key for key in keys if key != "rope_scaling"]
    tables = [_table(config, key, row, is_windowed) for key in keys] or [_default_table(row)]
    theta_key = "rope_local_base_freq" if is_windowed and row.has_kinds else "rope_theta"
    ropes = []
    for table in tables:
        factor = _partial_rotary_factor(config, table, row)
        theta = _theta(config, table, row, theta_key)
        rope, max_model_len = _rope(config, table, theta, max_position, row)
        beta = 0.0
        if table is not None and row.has_query_scale:
            beta = table.number(QUERY_BETA, 0, 1e3, default=0.0, is_nullable=True)
            if beta and rope.type not in TYPES_WITH_ORIGINAL:
                types = ", ".join(TYPES_WITH_ORIGINAL)
                raise table.refuse(QUERY_BETA, f"must be 0 where rope_type is none of {types}")
        rope = msgspec.structs.replace(rope, partial_rotary_factor=factor, query_beta=beta)
        ropes.append((rope, max_model_len))
    if ropes[0] != ropes[-1]:
        raise _contradiction(ropes[0][0], ropes[1][0])
    return ropes[0]


def _default_table(row: RopeKeys) -> Fields | None:
    if row.default_table is None:
        return None
    return Fields(row.default_table, "config.json: the rope_parameters of the family")


def _table(config: Fields, key: str, row: RopeKeys, is_windowed: bool) -> Fields | None:
    fields = config.table(key)
    nested = fields.tables()
    if row.has_kinds and key == "rope_parameters":
        if not nested:
            raise config.refuse(key, "must hold a table for each kind of layer")
        kind = "sliding_attention" if is_windowed else "full_attention"
        return fields.table(kind) if fields.has(kind) else None
    if nested:
        raise config.refuse(key, f"must be one table for all layers, not one for {nested[0]}")
    return fields


def _partial_rotary_factor(config: Fields, rope: Fields | None, row: RopeKeys) -> float:
    """partial_rotary_factor, from the rope table or the top level of config.json."""
    key, factors = "partial_rotary_factor", []
    for fields in (config, rope):
        if fields is not None:
            factor = fields.number(key, 0, 1, default=1.0, is_nullable=True)
            if factor != 1.0 and not row.has_partial:
                raise fields.refuse(key, "must be 1")
            if fields.has(key):
                factors.append(factor)
    if factors and rope is not None and factors[0] != factors[-1]:
        raise rope.refuse(key, f"contradicts the top level's {factors[0]:g}")
    return factors[0] if factors else row.default_partial


def _contradiction(scaling: RopeConfig, parameters: RopeConfig) -> ConfigError:
    name, one, other = next(
        (name, getattr(scaling, name), getattr(parameters, name))
        for name in RopeConfig.__struct_fields__
        if getattr(scaling, name) != getattr(parameters, name)
    )
    keys = {"type": "rope_type", "theta": "rope_theta", "latent_factor": "mscale_all_dim"}
    key = keys.get(name, name)
    return ConfigError(
        f"config.json: rope_scaling and rope_parameters disagree: {key} is {one} by the first and "
        f"{other} by the second; remove the one that is wrong"
    )


def _rope(
    config: Fields, rope: Fields | None, theta: float, max_position: int, row: RopeKeys
) -> tuple[RopeConfig, int]:
    """As `rope_from_fields`, from one table."""
    kind = _rope_type(rope, row.types)
    if rope is None or kind == "default":
        if rope is not None and rope.number("factor", 0, 1e9, default=1.0, is_nullable=True) != 1.0:
            raise rope.refuse("factor", 'has no meaning with rope_type "default"')
        return (
            RopeConfig(type="default", theta=theta, original_max_position=max_position),
            max_position,
        )
    if kind == "llama3":
        # max_position_embeddings already is the extended context, as it is with longrope.
        return _llama3(config, rope, theta, max_position), max_position
    if kind == "longrope":
        return _longrope(config, rope, theta, max_position), max_position
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


def _theta(config: Fields, rope: Fields | None, row: RopeKeys, top_key: str) -> float:
    """The base of the frequencies, from the rope table or from `top_key` at the top level."""
    default = row.default_theta if top_key == "rope_theta" else row.local_theta
    sources = [(config, top_key)] if rope is None else [(rope, "rope_theta"), (config, top_key)]
    saying = (
        [(fields, key) for fields, key in sources if fields.has(key)]
        or [(fields, key) for fields, key in sources if fields.is_null(key)]
        or sources[-1:]
    )
    # With a theta below 2 the frequencies hardly differ, and YaRN divides by its logarithm.
    thetas = [fields.number(key, 2.0, MAX_THETA, default=default) for fields, key in saying]
    if thetas[0] != thetas[-1]:
        fields, key = saying[0]
        raise fields.refuse(key, f"contradicts the top level's {thetas[-1]:g}")
    return thetas[0]


def _rope_type(rope: Fields | None, types: Mapping[str, RopeType]) -> RopeType:
    if rope is None:
        return "default"
    key = "rope_type" if rope.has("rope_type") else "type"
    if not rope.has(key) and rope.has("factor"):
        raise rope.refuse("rope_type", f"must be one of {', '.join(types)}")
    name = rope.string(key, default="default", is_nullable=True)
    if name not in types:
        raise rope.refuse(key, f"must be one of {', '.join(types)}")
    if rope.has("type") and types.get(rope.string("type")) != types[name]:
        raise rope.refuse("type", f"contradicts rope_type {name}")
    return types[name]


def _original_max_position(config: Fields, rope: Fields, max_position: int) -> int:
    """original_max_position_embeddings, from the rope table or, as in Phi-3, the top level."""
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
    mscale_all_dim = rope.number("mscale_all_dim", 0.0, 1e3, default=0.0, is_nullable=True)
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor", 0.0, 1e3)
    elif mscale_all_dim and rope.has("mscale"):
        mscale = rope.number("mscale", 0.0, 1e3)
        if mscale:
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
        latent_factor=_mscale(factor, mscale_all_dim) ** 2,
    )


def _longrope(config: Fields, rope: Fields, theta: float, max_position: int) -> RopeConfig:
    original = _original_max_position(config, rope, max_position)
    factor = rope.number(
        "factor", 1e-3, MAX_FACTOR, default=max_position / original, is_nullable=True
    )
    attention_factor = 1.0
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor", 0.0, 1e3)
    elif factor > 1.0:
        if original == 1:
            raise rope.refuse("original_max_position_embeddings", "must be above 1")
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        type="longrope",
        theta=theta,
        original_max_position=original,
        factor=factor,
        attention_factor=attention_factor,
        short_factors=rope.numbers("short_factor", 1e-3, MAX_FACTOR),
        long_factors=rope.numbers("long_factor", 1e-3, MAX_FACTOR),
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
