"""Tables of the rotary embedding (Su et al. 2021) and of its context extensions.

Computed in float32 with the same operations as in transformers, because models are trained with
those: at position 100,000 the angles are off by up to 0.004, and a more exact table would be that
of another model. Scalings: linear (kaiokendev), dynamic NTK (bloc97, emozilla), llama3 (Llama 3.1),
YaRN (Peng et al. 2023), LongRoPE (Ding et al. 2024); formulas as in transformers'
modeling_rope_utils.py.
"""

from __future__ import annotations

import math

import torch

from pyserve.model.rope_config import RopeConfig

ROWS_AT_A_TIME = 8192  # bounds the scratch memory of a long table


def cos_sin_table(
    rope: RopeConfig, head_dim: int, max_model_len: int, *, device: torch.device
) -> torch.Tensor:
    """float32 [max_model_len, head_dim]: row p holds the cosines, then the sines, of the
    head_dim / 2 angles at position p. head_dim is the number of dimensions that are rotated.

    Dynamic NTK has frequencies that depend on the sequence's length. Row p uses those of a sequence
    that ends with position p. That is what token-by-token decoding computes, also for a prompt, so
    a token's keys do not depend on how its prompt was cut into steps or on what came after it,
    and may be shared by the prefix cache. transformers rotates a whole prompt with the frequencies
    of its last token instead; the two agree up to original_max_position.

    LongRoPE has two sets of frequencies: see RopeConfig.is_long.
    """
    half = head_dim // 2
    table = torch.empty(max_model_len, head_dim, dtype=torch.float32)
    inv_freq = _inv_freq(rope, head_dim, max_model_len)
    for start in range(0, max_model_len, ROWS_AT_A_TIME):
        end = min(start + ROWS_AT_A_TIME, max_model_len)
        positions = torch.arange(start, end, dtype=torch.float32).unsqueeze(1)
        if rope.type == "dynamic":
            inv_freq = _dynamic_inv_freq(rope, head_dim, positions + 1)
        angles = positions * inv_freq
        table[start:end, :half] = angles.cos().mul_(rope.attention_factor)
        table[start:end, half:] = angles.sin().mul_(rope.attention_factor)
    return table.to(device)


def query_scales(
    rope: RopeConfig, max_model_len: int, *, device: torch.device
) -> torch.Tensor | None:
    """float32 [max_model_len]: the factor of q at each position; None if all factors are 1."""
    if not rope.query_beta or not rope.is_long(max_model_len):
        return None
    stretches = torch.arange(max_model_len, device=device) // rope.original_max_position
    return 1 + rope.query_beta * torch.log(1 + stretches.float())


def _inv_freq(rope: RopeConfig, head_dim: int, max_model_len: int) -> torch.Tensor:
    """float32 [head_dim / 2]: radians per token."""
    if rope.type == "yarn":
        return _yarn_inv_freq(rope, head_dim)
    inv_freq: torch.Tensor = 1.0 / (rope.theta ** _exponents(head_dim))
    if rope.type == "longrope":
        factors = rope.long_factors if rope.is_long(max_model_len) else rope.short_factors
        return 1.0 / (torch.tensor(factors) * rope.theta ** _exponents(head_dim))
    if rope.type == "linear":
        return inv_freq / rope.factor
    if rope.type == "llama3":
        return _llama3_inv_freq(rope, inv_freq)
    return inv_freq


def _exponents(head_dim: int) -> torch.Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _dynamic_inv_freq(rope: RopeConfig, head_dim: int, seq_lens: torch.Tensor) -> torch.Tensor:
    """The frequencies for sequences of these lengths: float32 [n, 1] -> [n, head_dim / 2]."""
    seq_lens = seq_lens.clamp(min=float(rope.original_max_position))
    stretch = rope.factor * seq_lens / rope.original_max_position - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    inv_freq: torch.Tensor = 1.0 / (theta ** _exponents(head_dim))
    return inv_freq


def _llama3_inv_freq(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Divide the frequencies of long wavelengths by the factor, keep short ones, blend between."""
    wavelengths = 2 * math.pi / inv_freq
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_divided = rope.original_max_position / rope.low_freq_factor
    blend = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    is_between = (wavelengths >= longest_kept) & (wavelengths <= shortest_divided)
    scaled = torch.where(wavelengths > shortest_divided, inv_freq / rope.factor, inv_freq)
    return torch.where(is_between, blended, scaled)


def _yarn_inv_freq(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Keep the frequencies of dimensions that turn more than beta_fast times over the original
    context, divide those that turn less than beta_slow times by the factor, and blend between."""

    def dimension_of(num_turns: float) -> float:
        turns_ratio = rope.original_max_position / (num_turns * 2 * math.pi)
        return head_dim * math.log(turns_ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in transformers: avoids a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = rope.theta ** _exponents(head_dim)
    kept = 1 - ramp
    inv_freq: torch.Tensor = (1.0 / (rope.factor * wavelengths)) * (1 - kept) + (
        1.0 / wavelengths
    ) * kept
    return inv_freq
