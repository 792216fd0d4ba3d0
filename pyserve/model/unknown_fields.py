"""Fields of config.json that pyserve does not read: reported, or refused if they change the result.

A model made by someone's modified code may say so only in a field of its own. Loading it as its
architecture's plain form would silently give other answers, even if transformers does the same.
Fields that add or drop tensors need not be listed: the loader compares all names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from pyserve.errors import ConfigError
from pyserve.model.fields import shown
from pyserve.model.latent_config import KNOWN_KEYS as LATENT_KEYS
from pyserve.model.registry import Architecture, Multimodal
from pyserve.model.rope_config import QUERY_BETA, ROPE_TABLES, RopeType

# Keys that are read elsewhere or have no effect on what is computed.
_KNOWN = frozenset(
    """
    architectures attention_bias attention_dropout bos_token_id compression_config
    classifier_from_token is_matryoshka is_original_qwen3_reranker matryoshka_dimensions
    sentence_transformers
    dtype eos_token_id head_dim hidden_act hidden_activation hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings mlp_bias model_type
    num_attention_heads num_hidden_layers num_key_value_heads pad_token_id partial_rotary_factor
    pretraining_tp quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    sliding_window tie_word_embeddings torch_dtype transformers_version use_cache vocab_size

    attn_implementation bad_words_ids chunk_size_feed_forward classifier_dropout custom_pipelines
    decoder_start_token_id embd_pdrop finetuning_task id2label is_decoder is_llama_config
    keys_to_ignore_at_inference label2id max_length name_or_path num_labels output_attentions
    cache_implementation output_hidden_states problem_type resid_pdrop return_dict sep_token_id
    task_specific_params temperature tokenizer_class top_k top_p torchscript
    transformers.js_config unsloth_fixed unsloth_version use_bfloat16 use_return_dict
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
    "longrope": frozenset(
        {"factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL_MAX_POSITION}
    ),
}
_KNOWN_IN_EVERY_ROPE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


class _Row(msgspec.Struct, frozen=True):
    """Which values of a field are neutral, that is, ask for what is computed anyway.

    neutral   these values, unless the architecture's row has its own, and null.
    same_as   instead: the value of this name in Model.values.
    is_null_refused
              null is not neutral, because transformers takes it for false.
    """

    neutral: tuple[object, ...] = ()
    same_as: str | None = None
    is_null_refused: bool = False


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What fields are compared with.

    architecture  the model's row of registry.py.
    rope_types    the rope types of its layers.
    values        head_dim, hidden_size, rms_norm_eps, rope_theta and softmax_scale, by name.
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


def _rows(row: _Row, names: str) -> dict[str, _Row]:
    """The same row for each of the names, which are separated by spaces."""
    return dict.fromkeys(names.split(), row)


# Fields that, unless their value is neutral, ask for another computation with the same tensors.
_CHANGING: dict[str, _Row] = {
    # positions
    **_rows(_OFF, "alibi use_alibi rope_interleave rope_interleaved rotary_interleaved use_mrope "
                  "use_dynamic_ntk"),
    **_rows(_ONE, "full_attn_mod interpolate_factor"),
    "position_embedding_type": _Row(("rope", "RoPE", "ROPE", "rotary")),
    "use_rope": _Row((True,)),
    **_rows(_ONE, "rope_pct rotary_pct rotary_percent rope_ratio rope_scaling_factor"),
    "rotary_dim": _Row(same_as="head_dim"),
    **_rows(_Row(same_as="rope_theta"), "rope_base rotary_base rotary_emb_base global_rope_theta "
                                        "local_rope_theta rope_local_base_freq"),
    **_rows(_NEVER, "layer_rope_theta no_rope_layers"),
    "no_rope_layer_interval": _NONE,
    # attention masks, and layers that share keys and values
    "is_causal": _Row((True,), is_null_refused=True),
    **_rows(_OFF, "is_encoder_decoder add_cross_attention use_bidirectional_attention prefix_lm "
                  "use_cla attention_k_eq_v"),
    **_rows(_NEVER, "attention_chunk_size attention_window_size sliding_window_pattern "
                    "sliding_window_size global_attn_every_n_layers kv_source_layers"),
    **_rows(_NONE, "attention_sinks attention_sink_size num_sink_tokens num_kv_shared_layers"),
    "cla_share_factor": _ONE,
    # scores
    **_rows(_NEVER, "attn_logit_softcapping log_scaling_n_floor clip_qkv"),
    **_rows(_NONE, "attn_temperature_tuning llama_4_scaling_beta"),
    "llama_4_scaling": _EMPTY,
    **_rows(_OFF, "use_logn_attn scale_attn_by_inverse_layer_idx qk_layer_norms qk_layernorm "
                  "qk_norm use_qk_norm"),
    "query_pre_attn_scalar": _Row(same_as="head_dim"),
    **_rows(_Row(same_as="softmax_scale"), "attention_multiplier attention_scale softmax_scale"),
    **_rows(_ONE, "attention_in_multiplier attention_out_multiplier attention_value_scale "
                  "key_multiplier qk_scale_factor"),
    "scale_attn_weights": _Row((True,)),
    # residual stream and norms
    **_rows(_OFF, "use_parallel_residual parallel_residual parallel_attn "
                  "new_decoder_architecture norm_after post_norm use_post_norm sandwich_norm "
                  "use_sandwich_norm apply_layernorm_1p layernorm_zero_centered_gamma "
                  "zero_centered_gamma"),
    **_rows(_ONE, "residual_multiplier residual_scale"),
    "scale_depth": _NEVER,
    "norm_type": _RMS,
    **_rows(
        _Row(same_as="rms_norm_eps"), "layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon"
    ),
    # MLP
    **_rows(_SILU, "activation_function mlp_hidden_act"),
    **_rows(_NEVER, "activation_sparsity_pattern mlp_gate_softcap mlp_multipliers swiglu_limit "
                    "swiglu_limits moe_intermediate_size"),
    "swiglu_alpha": _ONE,
    **_rows(_Row((0, 1)), "moe_num_experts n_routed_experts num_experts num_local_experts"),
    **_rows(_NONE, "num_experts_per_tok first_k_dense_replace n_shared_experts "
                   "shared_expert_intermediate_size"),
    **_rows(_ONE, "routed_scaling_factor moe_layer_freq"),
    **_rows(_Row((0, 1)), "n_group topk_group num_expert_group"),
    "scoring_func": _Row(("softmax",)),
    "topk_method": _Row(("greedy",)),
    "norm_topk_prob": _Row((True, False)),
    "mlp_only_layers": _Row(([],)),
    # embedding and logits
    **_rows(_ONE, "embedding_multiplier embedding_multiplier_scale embedding_scale scale_emb "
                  "mup_width_scale logit_scale logits_scaling lm_head_multiplier "
                  "output_multiplier output_multiplier_scale"),
    **_rows(_OFF, "scale_embedding mup_enabled use_mup"),
    "dim_model_base": _Row(same_as="hidden_size"),
    "lm_head_bias": _OFF,
    **_rows(_NEVER, "final_logit_softcapping logit_softcapping logits_soft_cap"),
    # layers that differ from each other, or are run more than once
    "block_configs": _NEVER,
    "per_layer_config": _EMPTY,
    **_rows(_ONE, "loop_num_passes n_recurrent_loops num_loops total_ut_steps"),
    # models within the model
    **_rows(_EMPTY, "audio_config language_config llm_config speech_config text_config "
                    "thinker_config vision_config"),
    # weights in another format
    **_rows(_OFF, "load_in_4bit load_in_8bit"),
    **_rows(_EMPTY, "quant_config quantization"),
}  # fmt: skip
# The same for keys in rope_scaling and rope_parameters.
_CHANGING_IN_ROPE: dict[str, _Row] = {
    **_rows(_ONE, "alpha attn_factor extrapolation_factor rope_ratio"),
    "apply_yarn_scaling": _Row((True,)),
    "llama_4_scaling_beta": _NONE,
    **_rows(_NEVER, "long_factor long_mscale mrope_section short_factor short_mscale"),
    "mrope_interleaved": _OFF,
}
# Latent attention scales its scores by this with every type of rope but the default one.
_CHANGING_IN_LATENT_ROPE = {**_CHANGING_IN_ROPE, "mscale_all_dim": _NONE}


def unknown_fields(raw: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """The names of unknown keys in config.json `raw`, sorted.

    Keys that begin with _ are comments and left out. A key in a rope table is named as
    "rope_scaling.key". Raises ConfigError for a key that changes what the model computes.
    """
    in_rope = _KNOWN_IN_EVERY_ROPE.union(*(_KNOWN_IN_ROPE[kind] for kind in model.rope_types))
    if model.architecture.rope.has_query_scale:
        in_rope |= {QUERY_BETA}
    known = _KNOWN | model.architecture.known_keys | in_rope & {_ORIGINAL_MAX_POSITION}
    if model.architecture.experts is not None:
        known |= model.architecture.experts.known_keys
    changing_in_rope = _CHANGING_IN_ROPE
    if model.architecture.is_latent:
        known |= LATENT_KEYS
        changing_in_rope = _CHANGING_IN_LATENT_ROPE
    names = set(_unknown(raw, "", known, _CHANGING, model))
    for table in ROPE_TABLES:
        for prefix, values in _rope_tables(raw, table, model):
            names.update(_unknown(values, prefix, in_rope, changing_in_rope, model))
    return tuple(sorted(names))


def unknown_outside_of_text(raw: Mapping[str, Any], row: Multimodal) -> set[str]:
    """The names of unknown keys of a multimodal config.json, outside of text_config."""
    known = _KNOWN | row.known_keys | {"text_config", "vision_config"}
    return {name for name in raw if name not in known and not name.startswith("_")}


def _rope_tables(
    raw: Mapping[str, Any], name: str, model: Model
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (prefix for its keys' names, table) for the table `name`, or for each table in it if it
    has one for each kind of layer."""
    table = raw.get(name)
    if not isinstance(table, dict):
        return
    kinds = [key for key, value in table.items() if isinstance(value, dict)]
    if not kinds or not model.architecture.rope.has_kinds:
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
