"""Flags of vLLM that have no meaning here, and what is known of any flag that is not ours.

Held against the flags of vLLM 0.7.3, 0.24 and 0.33. A form says what may stand behind a flag:

    SWITCH  nothing, or true or false; "no-", and "disable-" for "enable-", turn it round
    VALUE   one word
    LIST    one word or more
    JSON    one word: an object, or its entries one by one, as --hf-overrides.rope_theta 10000
"""

from __future__ import annotations

from dataclasses import dataclass

SWITCH, VALUE, LIST, JSON = "switch", "value", "list", "json"


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag that is known by name: one without meaning gives a warning, others see features.py.

    form      what may stand behind it
    neutral   what asks for nothing: vLLM's default; "None" and nothing at all never ask
    short     a further name
    instead   what to do in its place
    ignored   why it has no effect yet: it gives a warning with these words, and no error
    """

    form: str
    neutral: tuple[str, ...] = ()
    short: str | None = None
    instead: str | None = None
    ignored: str | None = None


def plain(form: str, names: str) -> dict[str, Flag]:
    """Rows that say no more than their form."""
    return dict.fromkeys(names.split(), Flag(form))


# Flags whose effect pyserve always has, or that steer machinery it does not have.
NO_MEANING: dict[str, Flag] = {
    # Always so here: a keep-alive line every 10 s, a hash of 128 bits and a key for each block.
    # Tools stay out of the prompt where tool_choice is none. What a reasoning parser needs is its
    # name.
    **plain(
        SWITCH,
        "enable-chunked-prefill enable-prompt-tokens-details enable-request-id-headers "
        "enable-server-load-tracking language-model-only disable-frontend-multiprocessing "
        "enable-reasoning enable-sleep-mode exclude-tools-when-tool-choice-none",
    ),
    **plain(VALUE, "sse-keep-alive-interval prefix-caching-hash-algo config-format"),
    # Never so here: code of a model does not run, prompts and outputs are not logged, there is no
    # log of accesses and no Cohere endpoint.
    **plain(
        SWITCH,
        "trust-remote-code enable-log-deltas disable-uvicorn-access-log cohere-is-reasoning-model",
    ),
    **plain(VALUE, "max-log-len disable-access-log-for-endpoints uvicorn-log-level cohere-format"),
    # Of machinery that is not here. One name is misspelt in vLLM as well.
    **plain(
        SWITCH,
        "disable-custom-all-reduce disable-fastapi-docs worker-use-ray "
        "use-v2-block-manager async-scheduling multi-step-stream-outputs "
        "disable-async-output-proc enable-offline-docs ray-workers-use-nsight "
        "disable-mm-preprocessor-cache enable-mfu-metrics kv-cache-metrics "
        "aggregate-engine-logging allow-deprecated-quantization cudagraph-metrics dcp-q-replicate "
        "disable-cascade-attn disable-chunked-mm-input disable-hybrid-kv-cache-manager "
        "disable-nccl-for-dp-synchronization enable-batch-sharded-sampling enable-cumem-allocator "
        "enable-dbo enable-ep-weight-filter enable-eplb enable-flash-late-interaction "
        "enable-flashinfer-autotune enable-hc-sp enable-layerwise-nvtx-tracing "
        "enable-logging-iteration-details enable-mamba-cache-stochastic-rounding "
        "enable-mamba-shared-prefix-checkpoint enable-nccl-comm-suspend enable-shm-tensor-arena "
        "fail-on-environ-validation interleave-mm-strings jit-monitor-verbose "
        "kv-sharing-fast-prefill mm-device-do-normalize monokernel numa-bind "
        "scheduler-reserve-full-isl skip-mm-profiling sleep-mode-offload-cudagraph "
        "specialize-active-lora swa-bounded-replay trust-request-mm-kwargs use-fp64-gumbel "
        "use-replayssm use-tqdm-on-load",
    ),
    **plain(
        VALUE,
        "swap-space num-scheduler-steps preemption-mode distributed-executor-backend "
        "max-seq-len-to-capture max-parallel-loading-workers attention-backend "
        "guided-decoding-backend tokenizer-pool-size tokenizer-mode num-lookahead-slots "
        "scheduler-delay-factor "
        "performance-mode fingerprint-mode h11-max-incomplete-event-size h11-max-header-count "
        "show-hidden-metrics-for-version tokenizer-pool-type "
        "intial-incremental-detokenization-offset all2all-backend cp-kv-cache-interleave-size "
        "cpu-distributed-timeout-seconds data-parallel-supervisor-port dbo-decode-token-threshold "
        "dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size "
        "distributed-timeout-seconds dp-supervisor-probe-failure-threshold "
        "dp-supervisor-probe-interval-s dp-supervisor-probe-timeout-s dp-sync-interval "
        "elastic-ep-max-dp-size expert-placement-strategy gdn-prefill-backend jit-monitor-mode "
        "kda-decode-backend kda-prefill-backend kv-cache-metrics-sample kv-offloading-backend "
        "linear-backend mamba-backend mamba-block-size mamba-cache-dtype mamba-cache-mode "
        "mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm master-addr "
        "master-port max-cudagraph-capture-size mm-encoder-attn-backend mm-encoder-attn-dtype "
        "mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin "
        "mm-encoder-fp8-scale-save-path mm-encoder-tp-mode mm-hasher-algorithm "
        "mm-ipc-gpu-memory-gb mm-processor-cache-gb mm-processor-cache-type mm-processor-device "
        "mm-shm-cache-max-object-size-mb mm-tensor-ipc moe-backend offload-backend "
        "offload-num-in-group offload-prefetch-step prefill-schedule-interval "
        "prefix-cache-retention-interval prefix-match-unit renderer-num-workers "
        "replayssm-buffer-len safetensors-load-strategy safetensors-prefetch-block-size "
        "safetensors-prefetch-num-threads sleep-mode-backend sparse-indexer-topk-backend "
        "ubatch-size video-pruning-method video-pruning-rate watermark",
    ),
    **plain(
        LIST,
        "collect-detailed-traces cudagraph-capture-sizes numa-bind-cpus numa-bind-nodes "
        "sleep-preserve-parameter-names",
    ),
    **plain(
        JSON,
        "tokenizer-pool-extra-config ec-manager-config eplb-config fault-tolerance-config "
        "ir-op-priority kernel-config pt-load-map-location watchdog-config watermark-config",
    ),
    "compilation-config": Flag(JSON, short="-cc"),
    "api-server-count": Flag(VALUE, short="-asc"),
    "optimization-level": Flag(VALUE, short="-O"),
    "attention-config": Flag(JSON, short="-ac"),
}
