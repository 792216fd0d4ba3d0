"""Flags, request fields and paths that are known by name but not built yet, grouped by feature.

When a feature is built, its rows leave this file. The row of a flag moves to the field of the
config object that it sets (config.py), or to foreign_flags.NO_MEANING if it has no meaning here.
The row of a request field is deleted, as a field without a row works. A path becomes a route.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pyserve.foreign_flags import JSON, LIST, SWITCH, VALUE, Flag, plain

# Names of the wire types of requests. SAMPLING is a base of both kinds of completions.
SAMPLING, CHAT, COMPLETION = "SamplingFields", "ChatRequest", "CompletionRequest"
TOKENIZE = "TokenizeRequest"
RESPONSES = "ResponsesRequest"
POOLING, EMBEDDING = "PoolingFields", "EmbeddingRequest"


@dataclass(frozen=True, slots=True)
class Field:
    """A request field that is not built: a 400 that names it, unless its value has no effect.

    of            the wire types, or bases of them, that have the field
    neutral       values, beside null, that have no effect
    is_harmless   whether another value has no effect in a given request; then the field is not
                  refused, but named in the header x-pyserve-ignored
    is_ignored    the field is never refused and always named in that header
    instead       what to send in its place, for the message
    """

    name: str
    of: tuple[str, ...]
    neutral: tuple[object, ...] = ()
    is_harmless: Callable[[Any], bool] | None = None
    is_ignored: bool = False
    instead: str = "leave it out"

    def is_neutral(self, value: object) -> bool:
        """Whether `value` has no effect.

        The types must match, too: 0 == False, but `logprobs: 0` requests logprobs, unlike `false`.
        """
        others = (other for other in self.neutral if type(other) is type(value))
        return value is None or value in others


@dataclass(frozen=True, slots=True)
class Feature:
    """What belongs to one feature that is not built.

    flags   the flags by name, without dashes
    fields  the request fields
    paths   paths, separated by spaces; all paths below them belong to the feature, too
    """

    flags: Mapping[str, Flag] = field(default_factory=dict)
    fields: tuple[Field, ...] = ()
    paths: str = ""


FEATURES: dict[str, Feature] = {
    "quantised weights": Feature(flags=plain(JSON, "quantization-config")),
    "quantised KV cache": Feature(
        flags={
            **plain(SWITCH, "calculate-kv-scales"),
            **plain(LIST, "kv-cache-dtype-skip-layers"),
            "kv-cache-dtype": Flag(VALUE, ("auto",)),
        }
    ),
    "tools": Feature(
        flags=plain(VALUE, "tool-parser-plugin tool-server tool-strict-level"),
    ),
    "reasoning": Feature(
        flags={
            **plain(VALUE, "reasoning-parser-plugin"),
            **plain(JSON, "reasoning-config reasoning-effort-map"),
            "anthropic-disabled-thinking-effort": Flag(VALUE, ("auto",)),
        },
    ),
    "settings of structured outputs": Feature(
        flags={
            "structured-outputs-config": Flag(
                JSON,
                tuple(f'{{"backend": "{name}"}}' for name in ("auto", "xgrammar", "guidance",
                                                              "outlines")),
                instead="give disable_any_whitespace and the like in requests",
            ),
        },
    ),
    "logprobs of processed logits": Feature(
        flags=plain(SWITCH, "return-sampling-mask"),
    ),
    "logits processors": Feature(
        flags={**plain(VALUE, "logits-processor-pattern"), **plain(LIST, "logits-processors")},
        fields=(Field("logits_processors", (SAMPLING,), ([],)),),
    ),
    "adapters": Feature(
        flags={
            **plain(SWITCH, "fully-sharded-loras enable-lora-bias "
                            "enable-mixed-moe-lora-format enable-moe-shared-loras "
                            "enable-tower-connector-lora"),
            **plain(VALUE, "long-lora-scaling-factors max-lora-cls-labels "
                           "qlora-adapter-name-or-path"),
            **plain(LIST, "lora-target-modules"),
            **plain(JSON, "default-mm-loras"),
            "lora-extra-vocab-size": Flag(VALUE, ("256",)),
        },
    ),
    "prompt adapters": Feature(
        flags={
            **plain(SWITCH, "enable-prompt-adapter"),
            **plain(LIST, "prompt-adapters"),
            "max-prompt-adapters": Flag(VALUE, ("1",)),
            "max-prompt-adapter-token": Flag(VALUE, ("0",)),
        }
    ),
    "several GPUs": Feature(
        flags={
            **plain(SWITCH, "headless enable-elastic-ep enable-fault-tolerance enable-scale-out"),
            **plain(VALUE, "worker-extension-cls"),
            "decode-context-parallel-size": Flag(VALUE, ("1",), short="-dcp"),
            "prefill-context-parallel-size": Flag(VALUE, ("1",), short="-pcp"),
            "data-parallel-size": Flag(VALUE, ("1",), short="-dp"),
            "data-parallel-rank": Flag(VALUE, short="-dpn"),
            "data-parallel-start-rank": Flag(VALUE, short="-dpr"),
            "data-parallel-size-local": Flag(VALUE, short="-dpl"),
            "data-parallel-address": Flag(VALUE, short="-dpa"),
            "data-parallel-rpc-port": Flag(VALUE, short="-dpp"),
            "data-parallel-backend": Flag(VALUE, ("mp",), short="-dpb"),
            "data-parallel-external-lb": Flag(SWITCH, short="-dpe"),
            "data-parallel-hybrid-lb": Flag(SWITCH, short="-dph"),
            "data-parallel-multi-port-external-lb": Flag(SWITCH, short="-dpm"),
            "nnodes": Flag(VALUE, ("1",), short="-n"),
            "node-rank": Flag(VALUE, ("0",), short="-r"),
            "device-ids": Flag(VALUE, instead="set CUDA_VISIBLE_DEVICES"),
            "worker-cls": Flag(VALUE, ("auto",)),
        }
    ),
    "mixtures of experts": Feature(
        flags={
            **plain(SWITCH, "enable-return-routed-experts"),
            "enable-expert-parallel": Flag(SWITCH, short="-ep"),
        }
    ),
    "speculation": Feature(
        flags={
            **plain(SWITCH, "speculative-disable-mqa-scorer disable-logprobs-during-spec-decoding"),
            **plain(VALUE, "speculative-model num-speculative-tokens ngram-prompt-lookup-max "
                           "ngram-prompt-lookup-min spec-method spec-model spec-tokens "
                           "speculative-model-quantization speculative-max-model-len "
                           "speculative-disable-by-batch-size "
                           "typical-acceptance-sampler-posterior-threshold "
                           "typical-acceptance-sampler-posterior-alpha"),
            "speculative-config": Flag(JSON, short="-sc"),
            "speculative-draft-tensor-parallel-size": Flag(VALUE, short="-spec-draft-tp"),
            "spec-decoding-acceptance-method": Flag(VALUE, ("rejection_sampler",)),
            "per-request-spec-decode-metrics": Flag(VALUE, ("none",)),
        }
    ),
    "embeddings": Feature(
        flags={
            **dict.fromkeys(
                ("override-pooler-config", "pooler-config"),
                Flag(
                    JSON,
                    ('{"pooling_type": "LAST"}', '{"pooling_type": "LAST", "normalize": true}'),
                    instead="the last token is what is pooled",
                ),
            ),
        },
        fields=(
            Field("messages", (EMBEDDING,), ([],), instead="send its text as input"),
            Field("normalize", (EMBEDDING,), (True,), instead="send use_activation"),
            Field("embed_dtype", (EMBEDDING,), ("float32", "float")),
            Field("endianness", (EMBEDDING,), ("native", "little")),
        ),
        paths="/v2/embed /pooling /classify",
    ),
    "prompt embeddings": Feature(
        flags={**plain(SWITCH, "enable-prompt-embeds")},
        fields=(Field("prompt_embeds", (COMPLETION,)),),
    ),
    "images, audio, video": Feature(
        flags={
            **plain(SWITCH, "mm-encoder-only enable-mm-embeds"),
            **plain(VALUE, "allowed-local-media-path"),
            **plain(LIST, "allowed-media-domains"),
            **plain(JSON, "limit-mm-per-prompt mm-processor-kwargs media-io-kwargs"),
            "diffusion-config": Flag(JSON, short="-dc"),
        },
        fields=(
            Field("mm_processor_kwargs", (CHAT, TOKENIZE), ({},), is_ignored=True),
            Field("media_io_kwargs", (CHAT, TOKENIZE), ({},), is_ignored=True),
        ),
        paths="/v1/audio /v1/images",
    ),
    "changed models": Feature(
        flags={
            **plain(SWITCH, "disable-sliding-window skip-tokenizer-init"),
            **plain(VALUE, "rope-theta hf-config-path override-attention-dtype "
                           "tokenizer-revision code-revision"),
            **plain(LIST, "ignore-patterns"),
            **plain(JSON, "rope-scaling override-neuron-config additional-config "
                          "engram-config model-class-overrides model-loader-extra-config"),
            "hf-overrides": Flag(JSON, instead="for a Qwen3-Reranker give --runner score"),
            "model-impl": Flag(VALUE, ("auto", "vllm")),
        }
    ),
    "defaults of requests": Feature(
        flags={
            **plain(SWITCH, "enable-force-include-usage"),
            **plain(JSON, "override-generation-config"),
            "response-role": Flag(VALUE, ("assistant",)),
            "chat-template-content-format": Flag(VALUE, ("auto",)),
        }
    ),
    "memory beyond the GPU": Feature(
        flags={
            **plain(VALUE, "kv-offloading-size"),
            **plain(LIST, "cpu-offload-params offload-params"),
            **plain(JSON, "kv-transfer-config kv-events-config ec-transfer-config "
                          "weight-transfer-config"),
            "cpu-offload-gb": Flag(VALUE, ("0",)),
            "offload-group-size": Flag(VALUE, ("0",)),
        },
        fields=(Field("kv_transfer_params", (SAMPLING,), ({},)),),
    ),
    "scheduling": Feature(
        flags={
            **plain(SWITCH, "long-prefill-token-threshold-adaptive"),
            **plain(VALUE, "num-gpu-blocks-override max-num-queued-tokens"),
            "max-num-partial-prefills": Flag(VALUE, ("1",)),
            "max-long-partial-prefills": Flag(VALUE, ("1",)),
            "long-prefill-token-threshold": Flag(VALUE, ("0",)),
            "max-num-active-seqs": Flag(VALUE, instead="use --max-num-seqs"),
            "max-num-queued-reqs": Flag(VALUE, instead="use --max-queue"),
            "max-num-scheduled-tokens": Flag(VALUE, instead="use --max-num-batched-tokens"),
            "scheduler-cls": Flag(VALUE, ("vllm.core.scheduler.Scheduler",)),
            "stream-interval": Flag(VALUE, ("1",)),
        }
    ),
    "TLS with clients' certificates": Feature(
        flags={
            **plain(SWITCH, "enable-ssl-refresh"),
            **plain(VALUE, "ssl-ca-certs ssl-ciphers"),
            "ssl-cert-reqs": Flag(VALUE, ("0",)),
        }
    ),
    "logs and traces": Feature(
        flags={
            **plain(SWITCH, "enable-log-outputs log-error-stack enable-per-request-metrics "
                            "enable-trace-replay"),
            **plain(VALUE, "log-config-file otlp-traces-endpoint fingerprint-value"),
            **plain(JSON, "logging-config custom-histogram-buckets profiler-config"),
        },
        paths="/start_profile /stop_profile",
    ),
    "plugins": Feature(
        flags={
            **plain(VALUE, "middleware io-processor-plugin"),
            **plain(JSON, "aux-output-config"),
        },
        fields=(Field("vllm_xargs", (SAMPLING,), ({},)),),
    ),
    "other interfaces": Feature(
        flags={
            **plain(SWITCH, "grpc tokens-only enable-tokenizer-info-endpoint"),
            **plain(VALUE, "grpc-port"),
        },
        paths="/tokenizer_info /inference /invocations /v1/chat/completions/batch "
        "/v1/chat/completions/render /v1/completions/render",
    ),
    "Responses": Feature(
        fields=(
            Field("conversation", (RESPONSES,), instead="send previous_response_id"),
            Field("prompt", (RESPONSES,), instead="send instructions and input"),
        ),
        paths="/v1/responses/compact /v1/conversations",
    ),
    "Messages": Feature(paths="/v1/messages/batches"),
    "the rest of OpenAI's API": Feature(
        paths="/v1/moderations /v1/assistants /v1/threads /v1/fine_tuning /v1/realtime"
    ),
    "filling in the middle": Feature(fields=(Field("suffix", (COMPLETION,), ("",)),)),
    "repetition detection": Feature(fields=(Field("repetition_detection", (SAMPLING,)),)),
}  # fmt: skip

# Fields that never affect an answer, whatever gets built.
NO_EFFECT = (
    Field("user", (SAMPLING, POOLING), is_ignored=True),
    Field("metadata", (SAMPLING,), ({},), is_ignored=True),
    Field("store", (SAMPLING,), (False,), is_ignored=True),
    Field("guided_decoding_backend", (SAMPLING,), is_ignored=True),
    Field("service_tier", (SAMPLING, RESPONSES), ("auto", "default"), is_ignored=True),
    Field("max_tool_calls", (RESPONSES,), is_ignored=True),  # limits tools that a server runs
    Field("client_metadata", (RESPONSES,), ({},), is_ignored=True),
    Field("stream_options", (RESPONSES,), ({}, {"include_obfuscation": False}), is_ignored=True),
    Field("spaces_between_special_tokens", (SAMPLING,), (True,), is_ignored=True),
)

FLAGS = {name: flag for feature in FEATURES.values() for name, flag in feature.flags.items()}
PATHS = tuple(path for feature in FEATURES.values() for path in feature.paths.split())


def fields_of(wire_type: type) -> dict[str, Field]:
    """The fields of a wire type that are not built or have no effect: name -> row."""
    names = {base.__name__ for base in wire_type.__mro__}
    rows = chain(NO_EFFECT, *(feature.fields for feature in FEATURES.values()))
    return {row.name: row for row in rows if not names.isdisjoint(row.of)}
