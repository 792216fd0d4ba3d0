"""Flag: what is known of a flag of vLLM that is not ours; and those that have no meaning here.

They come from vLLM 0.7.3, 0.24 and 0.33. The form of a flag says what values it takes:

    SWITCH  none, or true or false; "--no-", or "--disable-" for "--enable-", negates it
    VALUE   one word
    LIST    one or more words
    JSON    one word: an object, or its entries one by one, as --hf-overrides.rope_theta 10000
"""

from __future__ import annotations

from dataclasses import dataclass

SWITCH, VALUE, LIST, JSON = "switch", "value", "list", "json"


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of vLLM that is known by name: it has no meaning here, or is not built (features.py).

    form      what values it takes
    neutral   values that change nothing, such as vLLM's default; "None" and "" always count as such
    short     a further name, with its dash
    instead   what to do in its place, for the message
    ignored   why it has no effect yet: it then gives a warning with this text and no error
    """

    form: str
    neutral: tuple[str, ...] = ()
    short: str | None = None
    instead: str | None = None
    ignored: str | None = None


def plain(form: str, names: str) -> dict[str, Flag]:
    """Flags of which no more than the form is known; `names` are separated by spaces."""
    return dict.fromkeys(names.split(), Flag(form))


# Flags whose effect pyserve always has, or that control machinery that it does not have.
NO_MEANING: dict[str, Flag] = {
    # pyserve always behaves so, or has one fixed way: a keep-alive line every 10 s, hashes of 128
    # bits with a random key for the blocks, no tools in the prompt where tool_choice is none, and a
    # reasoning parser that needs no more than its name.
    **plain(
        SWITCH,
        "enable-chunked-prefill enable-prompt-tokens-details enable-request-id-headers "
        "enable-server-load-tracking language-model-only disable-frontend-multiprocessing "
        "enable-reasoning enable-sleep-mode exclude-tools-when-tool-choice-none",
    ),
    **plain(VALUE, "sse-keep-alive-interval prefix-caching-hash-algo config-format"),
    # pyserve never does these: it runs no code of models, logs no prompts and outputs, and has no
    # access log and no Cohere endpoint.
    **plain(
        SWITCH,
        "trust-remote-code enable-log-deltas disable-uvicorn-access-log cohere-is-reasoning-model",
    ),
    **plain(VALUE, "max-log-len disable-access-log-for-endpoints uvicorn-log-level cohere-format"),
    # These control machinery that pyserve does not have. One name is misspelt in vLLM as well.
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
