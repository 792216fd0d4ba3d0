"""Fields of config.json that nothing here reads: named, or refused where they change the result.

A model made by someone's changed code may say so only in a field of its own; loading it as its
architecture's plain form would give other answers without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyserve.errors import ConfigError

# Read elsewhere, or without effect on what is computed.
_KNOWN = frozenset(
    """
    architectures attention_bias attention_dropout auto_map bos_token_id compression_config
    dtype eos_token_id head_dim hidden_act hidden_activation hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias model_type
    num_attention_heads num_hidden_layers num_key_value_heads pad_token_id partial_rotary_factor
    pretraining_tp quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    sliding_window tie_word_embeddings torch_dtype transformers_version use_cache
    use_sliding_window vocab_size

    attn_implementation bad_words_ids chunk_size_feed_forward classifier_dropout custom_pipelines
    decoder_start_token_id embd_pdrop finetuning_task id2label is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id max_length name_or_path num_labels output_attentions
    output_hidden_states problem_type resid_pdrop return_dict sep_token_id task_specific_params
    temperature tokenizer_class top_k top_p torchscript unsloth_fixed unsloth_version use_bfloat16
    use_return_dict
    """.split()
)
# Other computations, by the value that asks for none.
_CHANGING: dict[str, tuple[object, ...]] = {
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1.0,),
    "embedding_scale": (1.0,),
    "final_logit_softcapping": (),
    "layer_norm_eps": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "moe_intermediate_size": (),
    "no_rope_layers": (),
    "num_experts": (0, 1),
    "num_experts_per_tok": (0,),
    "num_local_experts": (0, 1),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1.0,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}


def unknown_fields(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in config.json `raw` that mean nothing here, sorted; those that begin with _ are notes.

    Raises ConfigError for one that changes what the model computes.
    """
    for name, neutral in _CHANGING.items():
        value = raw.get(name)
        if value is not None and value not in neutral:
            raise ConfigError(
                f"config.json: {name} is {str(value)[:80]}, which changes what the model computes "
                "and is not supported"
            )
    known = _KNOWN | _CHANGING.keys()
    return tuple(sorted(name for name in raw if name not in known and not name.startswith("_")))
