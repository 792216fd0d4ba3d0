"""How vLLM reads its flags: what `vllm serve` of 0.7.3, 0.24.0 and 0.33.0 tell of their parsers.

Names without their dashes. A flag stands under each form that one of the versions gives it; the
forms were read from the argparse actions of the three wheels, not from documentation.
"""

from __future__ import annotations

# Nothing behind it; --no-NAME in the later versions.
SWITCHES = frozenset(
    """
    aggregate-engine-logging allow-credentials allow-deprecated-quantization async-scheduling
    calculate-kv-scales cohere-is-reasoning-model cudagraph-metrics data-parallel-external-lb
    data-parallel-hybrid-lb data-parallel-multi-port-external-lb dcp-q-replicate
    disable-async-output-proc disable-cascade-attn disable-chunked-mm-input
    disable-custom-all-reduce disable-fastapi-docs disable-frontend-multiprocessing
    disable-hybrid-kv-cache-manager disable-log-requests disable-log-stats
    disable-logprobs-during-spec-decoding disable-mm-preprocessor-cache
    disable-nccl-for-dp-synchronization disable-sliding-window disable-uvicorn-access-log
    enable-auto-tool-choice enable-batch-sharded-sampling enable-chunked-prefill
    enable-cumem-allocator enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb
    enable-expert-parallel enable-fault-tolerance enable-flash-late-interaction
    enable-flashinfer-autotune enable-force-include-usage enable-hc-sp
    enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs enable-log-requests
    enable-logging-iteration-details enable-lora enable-lora-bias
    enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint
    enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras
    enable-nccl-comm-suspend enable-offline-docs enable-per-request-metrics
    enable-prefix-caching enable-prompt-adapter enable-prompt-embeds
    enable-prompt-tokens-details enable-reasoning enable-request-id-headers
    enable-return-routed-experts enable-scale-out enable-server-load-tracking
    enable-shm-tensor-arena enable-sleep-mode enable-ssl-refresh
    enable-tokenizer-info-endpoint enable-tower-connector-lora enable-trace-replay
    enforce-eager exclude-tools-when-tool-choice-none fail-on-environ-validation
    fully-sharded-loras grpc headless interleave-mm-strings jit-monitor-verbose
    kv-cache-metrics kv-sharing-fast-prefill language-model-only log-error-stack
    long-prefill-token-threshold-adaptive mm-device-do-normalize mm-encoder-only monokernel
    multi-step-stream-outputs numa-bind ray-workers-use-nsight return-sampling-mask
    return-tokens-as-token-ids scheduler-reserve-full-isl skip-mm-profiling
    skip-tokenizer-init sleep-mode-offload-cudagraph specialize-active-lora
    speculative-disable-mqa-scorer swa-bounded-replay tokens-only trust-remote-code
    trust-request-chat-template trust-request-mm-kwargs use-fp64-gumbel use-replayssm
    use-tqdm-on-load use-v2-block-manager
    """.split()
)
# Of these, 0.7.3 wants true or false behind it, or nothing.
BOOLEANS = frozenset(
    """
    disable-logprobs-during-spec-decoding enable-chunked-prefill multi-step-stream-outputs
    """.split()
)
# One word.
VALUES = frozenset(
    """
    all2all-backend allowed-headers allowed-local-media-path allowed-methods allowed-origins
    anthropic-disabled-thinking-effort api-key api-server-count attention-backend block-size
    chat-template chat-template-content-format code-revision cohere-format
    collect-detailed-traces config config-format convert cp-kv-cache-interleave-size
    cpu-distributed-timeout-seconds cpu-offload-gb data-parallel-address data-parallel-backend
    data-parallel-rank data-parallel-rpc-port data-parallel-size data-parallel-size-local
    data-parallel-start-rank data-parallel-supervisor-port dbo-decode-token-threshold
    dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size
    decode-context-parallel-size device device-ids disable-access-log-for-endpoints
    distributed-executor-backend distributed-timeout-seconds download-dir
    dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s
    dp-supervisor-probe-timeout-s dp-sync-interval dtype elastic-ep-max-dp-size
    expert-placement-strategy fingerprint-mode fingerprint-value gdn-prefill-backend
    generation-config gpu-memory-utilization grpc-port guided-decoding-backend
    h11-max-header-count h11-max-incomplete-event-size hf-config-path hf-token host
    ignore-patterns io-processor-plugin jit-monitor-mode kda-decode-backend
    kda-prefill-backend kv-cache-dtype kv-cache-memory-bytes kv-cache-metrics-sample
    kv-offloading-backend kv-offloading-size linear-backend load-format log-config-file
    log-level logits-processor-pattern logprobs-mode long-lora-scaling-factors
    long-prefill-token-threshold lora-dtype lora-extra-vocab-size mamba-backend
    mamba-block-size mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds
    mamba-ssm-cache-dtype mamba-ssu-algorithm master-addr master-port max-cpu-loras
    max-cudagraph-capture-size max-log-len max-logprobs max-long-partial-prefills
    max-lora-cls-labels max-lora-rank max-loras max-model-len max-num-active-seqs
    max-num-batched-tokens max-num-partial-prefills max-num-queued-reqs max-num-queued-tokens
    max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers
    max-prompt-adapter-token max-prompt-adapters max-seq-len-to-capture middleware
    mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path
    mm-encoder-fp8-scale-save-margin mm-encoder-fp8-scale-save-path mm-encoder-tp-mode
    mm-hasher-algorithm mm-ipc-gpu-memory-gb mm-processor-cache-gb mm-processor-cache-type
    mm-processor-device mm-shm-cache-max-object-size-mb mm-tensor-ipc model model-impl
    moe-backend ngram-prompt-lookup-max ngram-prompt-lookup-min nnodes node-rank
    num-gpu-blocks-override num-lookahead-slots num-scheduler-steps num-speculative-tokens
    offload-backend offload-group-size offload-num-in-group offload-prefetch-step
    optimization-level otlp-traces-endpoint override-attention-dtype
    per-request-spec-decode-metrics performance-mode pipeline-parallel-size port
    preemption-mode prefill-context-parallel-size prefill-schedule-interval
    prefix-cache-retention-interval prefix-caching-hash-algo prefix-match-unit
    qlora-adapter-name-or-path quantization reasoning-parser reasoning-parser-plugin
    renderer-num-workers replayssm-buffer-len response-role revision root-path rope-theta
    runner safetensors-load-strategy safetensors-prefetch-block-size
    safetensors-prefetch-num-threads scheduler-cls scheduler-delay-factor scheduling-policy
    seed show-hidden-metrics-for-version shutdown-timeout sleep-mode-backend
    sparse-indexer-topk-backend spec-decoding-acceptance-method spec-method spec-model
    spec-tokens speculative-disable-by-batch-size speculative-draft-tensor-parallel-size
    speculative-max-model-len speculative-model speculative-model-quantization
    sse-keep-alive-interval ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile
    stream-interval swap-space tensor-parallel-size tokenizer tokenizer-mode
    tokenizer-pool-size tokenizer-pool-type tokenizer-revision tool-call-parser
    tool-parser-plugin tool-server tool-strict-level
    typical-acceptance-sampler-posterior-alpha typical-acceptance-sampler-posterior-threshold
    ubatch-size uds uvicorn-log-level video-pruning-method video-pruning-rate watermark
    worker-cls worker-extension-cls
    """.split()
)
# Of these, an empty word and None are as if the flag were not there.
NULLABLE = frozenset(
    """
    api-key attention-backend chat-template code-revision cpu-distributed-timeout-seconds
    dcp-comm-backend disable-access-log-for-endpoints distributed-executor-backend
    distributed-timeout-seconds download-dir fingerprint-value generation-config grpc-port
    hf-config-path host io-processor-plugin kv-cache-memory-bytes kv-offloading-size
    log-config-file logits-processor-pattern long-lora-scaling-factors mamba-block-size
    mamba-ssu-algorithm max-cpu-loras max-log-len max-lora-cls-labels max-num-active-seqs
    max-num-queued-reqs max-num-queued-tokens max-num-scheduled-tokens
    max-parallel-loading-workers middleware mm-encoder-attn-backend mm-encoder-attn-dtype
    mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-path num-gpu-blocks-override
    otlp-traces-endpoint override-attention-dtype prefix-cache-retention-interval
    prefix-match-unit quantization response-role revision root-path safetensors-load-strategy
    scheduler-cls show-hidden-metrics-for-version spec-method spec-model speculative-model
    speculative-model-quantization ssl-ca-certs ssl-certfile ssl-ciphers ssl-keyfile tokenizer
    tokenizer-revision tool-call-parser tool-server tool-strict-level uds video-pruning-rate
    """.split()
)
# Of these, 1k is 1,000 and 1K is 1,024.
SIZES = frozenset(
    """
    kv-cache-memory-bytes max-model-len max-num-batched-tokens safetensors-prefetch-block-size
    """.split()
)
# One word or more.
LISTS = frozenset(
    """
    allowed-media-domains api-key collect-detailed-traces cpu-offload-params
    cudagraph-capture-sizes ignore-patterns kv-cache-dtype-skip-layers logits-processors
    lora-modules lora-target-modules numa-bind-cpus numa-bind-nodes offload-params
    prompt-adapters served-model-name sleep-preserve-parameter-names
    """.split()
)
# One word of JSON, or --NAME.KEY VALUE.
OBJECTS = frozenset(
    """
    additional-config attention-config aux-output-config compilation-config
    custom-histogram-buckets default-chat-template-kwargs default-mm-loras diffusion-config
    ec-manager-config ec-transfer-config engram-config eplb-config fault-tolerance-config
    hf-overrides ir-op-priority kernel-config kv-events-config kv-transfer-config
    limit-mm-per-prompt logging-config media-io-kwargs mm-processor-kwargs
    model-class-overrides model-loader-extra-config override-generation-config
    override-neuron-config override-pooler-config pooler-config profiler-config
    pt-load-map-location quantization-config reasoning-config reasoning-effort-map
    rope-scaling speculative-config structured-outputs-config tokenizer-pool-extra-config
    watchdog-config watermark-config weight-transfer-config
    """.split()
)
# Other names.
ALIASES = {
    "--task": "runner",
    "--device-memory-utilization": "gpu-memory-utilization",
    "-O": "optimization-level",
    "-ac": "attention-config",
    "-asc": "api-server-count",
    "-cc": "compilation-config",
    "-dc": "diffusion-config",
    "-dcp": "decode-context-parallel-size",
    "-dp": "data-parallel-size",
    "-dpa": "data-parallel-address",
    "-dpb": "data-parallel-backend",
    "-dpe": "data-parallel-external-lb",
    "-dph": "data-parallel-hybrid-lb",
    "-dpl": "data-parallel-size-local",
    "-dpm": "data-parallel-multi-port-external-lb",
    "-dpn": "data-parallel-rank",
    "-dpp": "data-parallel-rpc-port",
    "-dpr": "data-parallel-start-rank",
    "-ep": "enable-expert-parallel",
    "-n": "nnodes",
    "-pcp": "prefill-context-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-q": "quantization",
    "-r": "node-rank",
    "-sc": "speculative-config",
    "-spec-draft-tp": "speculative-draft-tensor-parallel-size",
    "-tp": "tensor-parallel-size",
}
