"""The architectures that decoder.py can run, as data: one row each, no code.

A row says how config.json is read (defaults included) and which parts the layers have. The names
are those of `architectures` in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from pyserve.model.experts_config import ExpertsKeys
from pyserve.model.layer_config import Activation, LayerNames
from pyserve.model.rope_config import RopeKeys

SchemeName = Literal["dense", "w4a16", "fp8"]


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what distinguishes an architecture from the others.

    model_type        transformers' name of the family.
    defaults          values of keys that config.json lacks, as in the family's config class of
                      transformers. A key that is null does not get its default: a null
                      num_key_value_heads means num_attention_heads.
    attention_bias    bias of q, k and v: "config": as `attention_bias_key` says; or always; or
                      never.
    attention_bias_key
                      key of config.json.
    has_o_bias        the output projection has a bias if q, k and v have one.
    mlp_bias          bias of gate, up and down: "config": as the key mlp_bias says; or never.
    has_qk_norm       RMSNorm over each head of q and k before they are rotated, if qk_norm_key is
                      None.
    qk_norm_key       key of config.json that says whether there is such a norm.
    has_extra_layers  the checkpoint may hold further layers that predict more tokens (multi-token
                      prediction); they are not loaded.
    window            which layers have a sliding window. "none": no layer. "all": every layer,
                      whatever `use_sliding_window` says. "alternate": every second, beginning with
                      the first. "pattern": all but each `sliding_window_pattern`th. "upper": if
                      `use_sliding_window` is true, those from `max_window_layers` on.
    names             names of a layer's tensors.
    experts           how config.json describes mixtures of experts; None: no layer has one.
    activation_keys   keys of config.json; each that is present must name one of `activations`.
    activations       name in config.json -> activation; the first is the default.
    norm_offset       as NormConfig.offset.
    query_scale_key   key whose value ** -0.5 is the softmax scale; None: head_dim ** -0.5.
    softcap_keys      which of attn_logit_softcapping and final_logit_softcapping are read.
    is_embedding_scaled
                      embeddings are multiplied by sqrt(hidden_size).
    rope              how config.json describes the rotary embedding.
    is_latent         attention is multi-head latent attention (LatentConfig).
    has_pairs         as AttentionConfig.has_pairs, if pairs_key is None.
    pairs_key         key of config.json that says the same; true if it is absent.
    known_keys        keys of config.json that are read or harmless in this family only.
    neutral           key -> values that change nothing, if they differ from those of most families:
                      see unknown_fields.py.
    """

    model_type: str
    defaults: Mapping[str, object] = {}
    attention_bias: Literal["config", "always", "never"] = "never"
    attention_bias_key: str = "attention_bias"
    has_o_bias: bool = False
    mlp_bias: Literal["config", "never"] = "never"
    has_qk_norm: bool = False
    qk_norm_key: str | None = None
    has_extra_layers: bool = False
    window: Literal["none", "all", "alternate", "pattern", "upper"] = "none"
    names: LayerNames = LayerNames()
    experts: ExpertsKeys | None = None
    activation_keys: tuple[str, ...] = ("hidden_act", "hidden_activation")
    activations: Mapping[str, Activation] = msgspec.field(
        default_factory=lambda: {"silu": "silu", "swish": "silu"}
    )
    norm_offset: float = 0.0
    query_scale_key: str | None = None
    softcap_keys: tuple[str, ...] = ()
    is_embedding_scaled: bool = False
    rope: RopeKeys = RopeKeys()
    is_latent: bool = False
    has_pairs: bool = False
    pairs_key: str | None = None
    known_keys: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[object, ...]] = {}


class Multimodal(msgspec.Struct, frozen=True, kw_only=True):
    """A multimodal model, of which only the text model is served, as `text_config` describes it.

    model_type   transformers' name of the family.
    text_types   model types that the text model may have; the first is the default.
    towers       modules of the checkpoint that are not loaded.
    known_keys   keys of config.json outside of text_config that concern the towers only.
    """

    model_type: str
    text_types: tuple[str, ...]
    towers: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    known_keys: frozenset[str] = frozenset()


_UPPER_KEYS = frozenset({"use_sliding_window", "max_window_layers"})
# Other names of keys about norms over the heads of q and k.
_QK_NORM_KEYS = ("qk_layer_norms", "qk_layernorm", "qk_norm", "use_qk_norm")
_WINDOW = 4096
_FUSED_MLP = ("gate_up_proj",)
_GELU_TANH: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}
_GEMMA_NAMES = LayerNames(
    norms_before=("input_layernorm", "pre_feedforward_layernorm"),
    norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
)
_GEMMA_DEFAULTS = {
    "head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
    "sliding_window": _WINDOW, "tie_word_embeddings": True,
}  # fmt: skip
_NEXT_TOKENS_KEYS = frozenset({"num_nextn_predict_layers", "num_mtp_layers"})
# Keys that matter only for DeepSeek's own training and code.
_TRAINING_KEYS = frozenset({"aux_loss_alpha", "ep_size", "seq_aux"})
_CORRECTED = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
_SHARED_EXPERTS = LayerNames(shared_expert="shared_experts")
_ATTN_SOFTCAP, _FINAL_SOFTCAP = "attn_logit_softcapping", "final_logit_softcapping"

ARCHITECTURES: dict[str, Architecture] = {
    "DeepseekV2ForCausalLM": Architecture(
        model_type="deepseek_v2", attention_bias="config", is_latent=True, has_pairs=True,
        names=_SHARED_EXPERTS,
        experts=ExpertsKeys(
            num_experts=("n_routed_experts", "num_experts"), default_num=64, has_topk_method=True,
            is_normalized="never", num_shared="n_shared_experts", dense_layers="first",
        ),
        defaults={
            "q_lora_rank": 1536, "first_k_dense_replace": 0, "moe_intermediate_size": 1407,
            "n_shared_experts": 2, "max_position_embeddings": 2048,
        },
        known_keys=_TRAINING_KEYS,
        # norm_topk_prob: the model's own code then normalises the weights instead of scaling them,
        # transformers only scales them.
        neutral={"norm_topk_prob": (False,), "rope_interleave": (True,)},
    ),
    "DeepseekV3ForCausalLM": Architecture(
        model_type="deepseek_v3", attention_bias="config", is_latent=True,
        pairs_key="rope_interleave", has_extra_layers=True, names=_SHARED_EXPERTS,
        experts=ExpertsKeys(
            num_experts=("n_routed_experts", "num_local_experts"), default_num=256,
            is_sigmoid=True, num_shared="n_shared_experts", dense_layers="first",
        ),
        defaults={
            "q_lora_rank": 1536, "first_k_dense_replace": 3, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
            "max_position_embeddings": 4096,
        },
        known_keys=_TRAINING_KEYS | _NEXT_TOKENS_KEYS | {"rope_interleave"},
        neutral=_CORRECTED,
    ),
    "Gemma2ForCausalLM": Architecture(
        model_type="gemma2", attention_bias="config", has_o_bias=True, window="alternate",
        names=_GEMMA_NAMES, activation_keys=("hidden_activation",), activations=_GELU_TANH,
        norm_offset=1.0, query_scale_key="query_pre_attn_scalar", is_embedding_scaled=True,
        softcap_keys=(_ATTN_SOFTCAP, _FINAL_SOFTCAP),
        defaults={**_GEMMA_DEFAULTS, _ATTN_SOFTCAP: 50.0, _FINAL_SOFTCAP: 30.0},
        known_keys=frozenset({"query_pre_attn_scalar", _ATTN_SOFTCAP, _FINAL_SOFTCAP}),
    ),
    "Gemma3ForCausalLM": Architecture(
        model_type="gemma3_text", attention_bias="config", has_o_bias=True, has_qk_norm=True,
        window="pattern", names=_GEMMA_NAMES, activation_keys=("hidden_activation",),
        activations=_GELU_TANH, norm_offset=1.0, query_scale_key="query_pre_attn_scalar",
        is_embedding_scaled=True, softcap_keys=(_FINAL_SOFTCAP,),
        # The text_config of a multimodal model has little more than sizes that differ from these.
        defaults={
            **_GEMMA_DEFAULTS, "vocab_size": 262208, "hidden_size": 2304,
            "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
            "max_position_embeddings": 131072,
        },
        rope=RopeKeys(has_kinds=True, default_theta=1e6),
        known_keys=frozenset(
            {
                "query_pre_attn_scalar", _FINAL_SOFTCAP, "sliding_window_pattern",
                "rope_local_base_freq",
            }
        ),
    ),
    "Glm4ForCausalLM": Architecture(
        model_type="glm4", attention_bias="config", has_pairs=True,
        names=LayerNames(
            gate_up=_FUSED_MLP, norms_after=("post_self_attn_layernorm", "post_mlp_layernorm"),
        ),
        defaults={
            "attention_bias": True, "head_dim": 128, "num_key_value_heads": 2,
            "rms_norm_eps": 1.5625e-7,
        },
        rope=RopeKeys(has_partial=True, default_partial=0.5),
    ),
    "Glm4MoeForCausalLM": Architecture(
        model_type="glm4_moe", attention_bias="config", qk_norm_key="use_qk_norm",
        has_extra_layers=True, names=_SHARED_EXPERTS,
        experts=ExpertsKeys(
            num_experts=("n_routed_experts", "num_local_experts"), default_num=128,
            is_sigmoid=True, num_shared="n_shared_experts", dense_layers="first",
        ),
        defaults={
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "intermediate_size": 10944,
            "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1,
            "norm_topk_prob": True,
        },
        rope=RopeKeys(has_partial=True, default_partial=0.5),
        known_keys=_NEXT_TOKENS_KEYS | {"use_qk_norm"},
    ),
    "Glm4MoeLiteForCausalLM": Architecture(
        model_type="glm4_moe_lite", attention_bias="config", is_latent=True,
        pairs_key="rope_interleave", has_extra_layers=True, names=_SHARED_EXPERTS,
        experts=ExpertsKeys(
            num_experts=("n_routed_experts", "num_local_experts"), default_num=64,
            is_sigmoid=True, num_shared="n_shared_experts", dense_layers="types",
        ),
        defaults={
            "q_lora_rank": 768, "rms_norm_eps": 1e-5, "intermediate_size": 10240,
            "moe_intermediate_size": 1536, "n_shared_experts": 1, "num_experts_per_tok": 4,
            "norm_topk_prob": True, "routed_scaling_factor": 1.8,
            "max_position_embeddings": 202752,
        },
        known_keys=_NEXT_TOKENS_KEYS | {"rope_interleave"},
        neutral=_CORRECTED,
    ),
    "LlamaForCausalLM": Architecture(
        model_type="llama", attention_bias="config", has_o_bias=True, mlp_bias="config",
        known_keys=frozenset({"use_sliding_window"}),
    ),
    "Ministral3ForCausalLM": Architecture(
        model_type="ministral3", window="all",
        defaults={
            "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
        },
        rope=RopeKeys(
            has_query_scale=True,
            default_table={
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
                "llama_4_scaling_beta": 0.1,
            },
        ),
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral", window="all",
        defaults={"num_key_value_heads": 8, "sliding_window": _WINDOW},
    ),
    "MixtralForCausalLM": Architecture(
        model_type="mixtral", window="all",
        names=LayerNames(mlp="block_sparse_moe", gate_up=("w1", "w3"), down="w2"),
        experts=ExpertsKeys(
            default_num=8, size="intermediate_size", is_normalized="always", dense_layers="none",
        ),
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2},
        rope=RopeKeys(default_theta=1e6),
        neutral={"norm_topk_prob": (True,)},
    ),
    "Phi3ForCausalLM": Architecture(
        model_type="phi3", window="all",
        names=LayerNames(qkv=("qkv_proj",), gate_up=_FUSED_MLP),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        rope=RopeKeys(
            # The family's first files call LongRoPE "su" or "yarn".
            types={
                "default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"
            },
            has_partial=True,
        ),
        known_keys=frozenset({"original_max_position_embeddings"}),
    ),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2", attention_bias="always", window="upper",
        defaults={"num_key_value_heads": 32, "sliding_window": _WINDOW},
        known_keys=_UPPER_KEYS,
    ),
    "Qwen2MoeForCausalLM": Architecture(
        model_type="qwen2_moe", attention_bias="config", attention_bias_key="qkv_bias",
        experts=ExpertsKeys(default_num=60, shared_size="shared_expert_intermediate_size"),
        defaults={
            "num_key_value_heads": 16, "qkv_bias": True, "use_sliding_window": False,
            "sliding_window": _WINDOW, "intermediate_size": 5632, "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        },
        known_keys=_UPPER_KEYS | {"qkv_bias"},
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3", attention_bias="config", has_o_bias=True, has_qk_norm=True,
        window="upper",
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": _WINDOW},
        known_keys=_UPPER_KEYS,
        neutral=dict.fromkeys(_QK_NORM_KEYS, (True,)),
    ),
    "Qwen3MoeForCausalLM": Architecture(
        model_type="qwen3_moe", attention_bias="config", has_o_bias=True, has_qk_norm=True,
        experts=ExpertsKeys(default_num=128),
        defaults={
            "num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": _WINDOW,
            "intermediate_size": 6144, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        },
        known_keys=_UPPER_KEYS,
        neutral=dict.fromkeys(_QK_NORM_KEYS, (True,)),
    ),
}  # fmt: skip

_IMAGE_KEYS = frozenset({"image_token_index", "image_token_id", "vision_feature_layer"})

MULTIMODAL: dict[str, Multimodal] = {
    "Gemma3ForConditionalGeneration": Multimodal(
        model_type="gemma3", text_types=("gemma3_text",),
        known_keys=_IMAGE_KEYS
        | {
            "boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index",
            "mm_tokens_per_image",
        },
    ),
    "Mistral3ForConditionalGeneration": Multimodal(
        model_type="mistral3", text_types=("mistral", "ministral3"),
        known_keys=_IMAGE_KEYS
        | {"multimodal_projector_bias", "projector_hidden_act", "spatial_merge_size"},
    ),
}  # fmt: skip
