"""Fields of config.json that nothing here reads: named, or refused where they change the result.

A model made by someone's changed code may say so only in a field of its own. Loading it as its
architecture's plain form would give other answers without a word, even where transformers does so.
What adds or drops a tensor need not be listed: the loader compares all names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from pyserve.errors import ConfigError
from pyserve.model.fields import shown
from pyserve.model.registry import Architecture
from pyserve.model.rope_config import ROPE_TABLES, RopeType

# Read elsewhere, or without effect on what is computed.
_KNOWN = frozenset(
    """
    architectures attention_bias attention_dropout bos_token_id compression_config
    dtype eos_token_id head_dim hidden_act hidden_activation hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings mlp_bias model_type
    num_attention_heads num_hidden_layers num_key_value_heads pad_token_id partial_rotary_factor
    pretraining_tp quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    sliding_window tie_word_embeddings torch_dtype transformers_version use_cache vocab_size

    attn_implementation bad_words_ids chunk_size_feed_forward classifier_dropout custom_pipelines
    decoder_start_token_id embd_pdrop finetuning_task id2label is_decoder is_llama_config
    keys_to_ignore_at_inference label2id max_length name_or_path num_labels output_attentions
    output_hidden_states problem_type resid_pdrop return_dict sep_token_id task_specific_params
    temperature tokenizer_class top_k top_p torchscript transformers.js_config unsloth_fixed
    unsloth_version use_bfloat16 use_return_dict
    """.split()
)
_ORIGINAL_MAX_POSITION = "original_max_position_embeddings"
_KNOWN_IN_ROPE: dict[RopeType, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_MAX_POSITION}),
    "yarn": frozenset(
        """
        factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate finetuned
        """.split()
    )
    | {_ORIGINAL_MAX_POSITION},
}
_KNOWN_IN_EVERY_ROPE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


class _Row(msgspec.Struct, frozen=True):
    """Which values of a field ask for nothing else than is computed here.

    neutral   these, and null, where the architecture does not say others.
    same_as   the value of this name in Model.values.
    is_null_refused
              null is not neutral: transformers takes it for false.
    """

    neutral: tuple[object, ...] = ()
    same_as: str | None = None
    is_null_refused: bool = False


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What a field may be compared with.

    values   head_dim, hidden_size, rms_norm_eps, rope_theta, softmax_scale.
    """

    architecture: Architecture
    rope_types: frozenset[RopeType]
    values: dict[str, float]


_NEVER = _Row()
_OFF = _Row((False,))
_NONE = _Row((0, False))
_ONE = _Row((1,))
_EMPTY = _Row(({},))
_SILU = _Row(("silu", "swish"))
_RMS = _Row(("rms", "rms_norm", "rmsnorm", "RMSNorm"))

# Fields that ask for another computation over the same tensors, unless their value is neutral.
_CHANGING: dict[str, _Row] = {
    # positions
    "alibi": _OFF,
    "use_alibi": _OFF,
    "position_embedding_type": _Row(("rope", "RoPE", "ROPE", "rotary")),
    "use_rope": _Row((True,)),
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "rotary_interleaved": _OFF,
    "rope_pct": _ONE,
    "rotary_pct": _ONE,
    "rotary_percent": _ONE,
    "rotary_dim": _Row(same_as="head_dim"),
    "rope_ratio": _ONE,
    "rope_scaling_factor": _ONE,
    "rope_base": _Row(same_as="rope_theta"),
    "rotary_base": _Row(same_as="rope_theta"),
    "rotary_emb_base": _Row(same_as="rope_theta"),
    "global_rope_theta": _Row(same_as="rope_theta"),
    "local_rope_theta": _Row(same_as="rope_theta"),
    "rope_local_base_freq": _Row(same_as="rope_theta"),
    "layer_rope_theta": _NEVER,
    "no_rope_layers": _NEVER,
    "no_rope_layer_interval": _NONE,
    "use_mrope": _OFF,
    "use_dynamic_ntk": _OFF,
    # attention masks, and layers that share keys and values
    "is_causal": _Row((True,), is_null_refused=True),
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "use_bidirectional_attention": _OFF,
    "prefix_lm": _OFF,
    "attention_chunk_size": _NEVER,
    "attention_window_size": _NEVER,
    "sliding_window_pattern": _NEVER,
    "sliding_window_size": _NEVER,
    "global_attn_every_n_layers": _NEVER,
    "attention_sinks": _NONE,
    "attention_sink_size": _NONE,
    "num_sink_tokens": _NONE,
    "use_cla": _OFF,
    "cla_share_factor": _ONE,
    "num_kv_shared_layers": _NONE,
    "kv_source_layers": _NEVER,
    "attention_k_eq_v": _OFF,
    # scores
    "attn_logit_softcapping": _NEVER,
    "attn_temperature_tuning": _NONE,
    "llama_4_scaling": _EMPTY,
    "llama_4_scaling_beta": _NONE,
    "log_scaling_n_floor": _NEVER,
    "use_logn_attn": _OFF,
    "clip_qkv": _NEVER,
    "query_pre_attn_scalar": _Row(same_as="head_dim"),
    "attention_multiplier": _Row(same_as="softmax_scale"),
    "attention_scale": _Row(same_as="softmax_scale"),
    "softmax_scale": _Row(same_as="softmax_scale"),
    "attention_in_multiplier": _ONE,
    "attention_out_multiplier": _ONE,
    "attention_value_scale": _ONE,
    "key_multiplier": _ONE,
    "qk_scale_factor": _ONE,
    "scale_attn_weights": _Row((True,)),
    "scale_attn_by_inverse_layer_idx": _OFF,
    "qk_layer_norms": _OFF,
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "use_qk_norm": _OFF,
    # residual stream and norms
    "use_parallel_residual": _OFF,
    "parallel_residual": _OFF,
    "parallel_attn": _OFF,
    "new_decoder_architecture": _OFF,
    "residual_multiplier": _ONE,
    "residual_scale": _ONE,
    "scale_depth": _NEVER,
    "norm_after": _OFF,
    "post_norm": _OFF,
    "use_post_norm": _OFF,
    "sandwich_norm": _OFF,
    "use_sandwich_norm": _OFF,
    "norm_type": _RMS,
    "layer_norm_eps": _Row(same_as="rms_norm_eps"),
    "layer_norm_epsilon": _Row(same_as="rms_norm_eps"),
    "norm_eps": _Row(same_as="rms_norm_eps"),
    "norm_epsilon": _Row(same_as="rms_norm_eps"),
    "apply_layernorm_1p": _OFF,
    "layernorm_zero_centered_gamma": _OFF,
    "zero_centered_gamma": _OFF,
    # MLP
    "activation_function": _SILU,
    "mlp_hidden_act": _SILU,
    "activation_sparsity_pattern": _NEVER,
    "mlp_gate_softcap": _NEVER,
    "mlp_multipliers": _NEVER,
    "swiglu_alpha": _ONE,
    "swiglu_limit": _NEVER,
    "swiglu_limits": _NEVER,
    "moe_intermediate_size": _NEVER,
    "moe_num_experts": _Row((0, 1)),
    "n_routed_experts": _Row((0, 1)),
    "num_experts": _Row((0, 1)),
    "num_experts_per_tok": _NONE,
    "num_local_experts": _Row((0, 1)),
    # embedding and logits
    "embedding_multiplier": _ONE,
    "embedding_multiplier_scale": _ONE,
    "embedding_scale": _ONE,
    "scale_emb": _ONE,
    "scale_embedding": _OFF,
    "dim_model_base": _Row(same_as="hidden_size"),
    "mup_enabled": _OFF,
    "use_mup": _OFF,
    "mup_width_scale": _ONE,
    "final_logit_softcapping": _NEVER,
    "logit_softcapping": _NEVER,
    "logits_soft_cap": _NEVER,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "lm_head_multiplier": _ONE,
    "output_multiplier": _ONE,
    "output_multiplier_scale": _ONE,
    # layers that differ from each other, or are run more than once
    "block_configs": _NEVER,
    "per_layer_config": _EMPTY,
    "loop_num_passes": _ONE,
    "n_recurrent_loops": _ONE,
    "num_loops": _ONE,
    "total_ut_steps": _ONE,
    # models within the model
    "audio_config": _EMPTY,
    "language_config": _EMPTY,
    "llm_config": _EMPTY,
    "speech_config": _EMPTY,
    "text_config": _EMPTY,
    "thinker_config": _EMPTY,
    "vision_config": _EMPTY,
    # weights in another format
    "load_in_4bit": _OFF,
    "load_in_8bit": _OFF,
    "quant_config": _EMPTY,
    "quantization": _EMPTY,
}
# The same for keys within rope_scaling and rope_parameters.
_CHANGING_IN_ROPE: dict[str, _Row] = {
    "alpha": _ONE,
    "apply_yarn_scaling": _Row((True,)),
    "attn_factor": _ONE,
    "extrapolation_factor": _ONE,
    "llama_4_scaling_beta": _NONE,
    "long_factor": _NEVER,
    "long_mscale": _NEVER,
    "mrope_interleaved": _OFF,
    "mrope_section": _NEVER,
    "rope_ratio": _ONE,
    "short_factor": _NEVER,
    "short_mscale": _NEVER,
}


def unknown_fields(raw: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """Names in config.json `raw` that mean nothing here, sorted; those that begin with _ are notes.

    Keys of a rope table follow its name and a point. Raises ConfigError for one that changes what
    the model computes.
    """
    in_rope = _KNOWN_IN_EVERY_ROPE.union(*(_KNOWN_IN_ROPE[kind] for kind in model.rope_types))
    known = _KNOWN | model.architecture.known_keys | in_rope & {_ORIGINAL_MAX_POSITION}
    names = set(_unknown(raw, "", known, _CHANGING, model))
    for table in ROPE_TABLES:
        for prefix, values in _rope_tables(raw, table, model):
            names.update(_unknown(values, prefix, in_rope, _CHANGING_IN_ROPE, model))
    return tuple(sorted(names))


def _rope_tables(
    raw: Mapping[str, Any], name: str, model: Model
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(prefix of its keys, a table): the one of this name, or those in it for kinds of layers."""
    table = raw.get(name)
    if not isinstance(table, dict):
        return
    kinds = [key for key, value in table.items() if isinstance(value, dict)]
    if not kinds or not model.architecture.has_ropes_by_kind:
        yield f"{name}.", table
        return
    for kind in kinds:
        yield f"{name}.{kind}.", table[kind]


def _unknown(
    raw: Mapping[str, Any], prefix: str, known: frozenset[str], changing: Mapping[str, _Row],
    model: Model,
) -> Iterator[str]:  # fmt: skip
    for name, value in raw.items():
        if name in known or name.startswith("_"):
            continue
        row = changing.get(name)
        if row is None:
            yield f"{prefix}{name}"
        elif not _is_neutral(name, value, row, model):
            raise ConfigError(
                f"config.json: {prefix}{name} is {shown(value)}, which changes what the model "
                "computes and is not supported"
            )


def _is_neutral(name: str, value: object, row: _Row, model: Model) -> bool:
    if value is None:
        return not row.is_null_refused
    if row.same_as is not None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return math.isclose(value, model.values[row.same_as], rel_tol=1e-6)
    neutral = model.architecture.neutral.get(name, row.neutral)
    # true equals 1 in Python, but "num_experts": true is not one expert.
    return any(value == item and (value is not True or item is True) for item in neutral)
