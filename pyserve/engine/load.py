"""build_engine: from an EngineConfig to an engine that is ready to start. Runs on a worker thread.

It reports three phases. build: make the memory plan, compile or load the native code. load: read
the weights, counted in bytes. warmup: on a card run the largest step, allocate the KV cache and run
every other step shape; last, run one sequence through the whole engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from pyserve import host, log
from pyserve.client import EngineInfo, PoolingInfo, SequenceRequest
from pyserve.config import DEMO_MODEL, EngineConfig, launched
from pyserve.engine import devices
from pyserve.engine.adapter_slots import AdapterSlots
from pyserve.engine.adapters import HostAdapters
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.chunks import ChunkPacer
from pyserve.engine.cpu_runner import CpuRunner
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine, Runner
from pyserve.engine.executor import StepExecutor
from pyserve.engine.planner import (
    HostMemory,
    Memory,
    MemoryPlan,
    fit_kv,
    format_ledger,
    is_ledger_true,
    plan_memory,
)
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.sleep import CardSleeper, HostSleeper, Sleep, Sleeper, Weights
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.tensor_parallel.link import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    Work,
    estimate,
    measure,
)
from pyserve.engine.tensor_parallel.ranks import Ranks
from pyserve.engine.tensor_parallel.spawned import Spawned
from pyserve.engine.trace import Trace
from pyserve.engine.warmup import warmup_steps
from pyserve.errors import CheckpointError, DeviceError, PlanError, StartupError
from pyserve.model.adapter_weights import AdapterWeights, read_adapter
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import check_checkpoint, load_model
from pyserve.model.placement import META, Placement
from pyserve.model.sharing import check_pipeline, check_sharing, tp_sizes
from pyserve.ops import build
from pyserve.ops.group import LEADER, Group, ProcessGroup
from pyserve.ops.quantised import first_rounded_row
from pyserve.params import POOLED, SamplingParams
from pyserve.words import counted

Progress = Callable[[str, int, int], None]  # phase, done, total

WARMUP_PROMPT_LEN = 16
CPU_WARMUP_BUDGET_S = 1.0  # larger shapes of a large model are then first run while serving
QUEUE_FACTOR = 4  # default --max-queue: this many waiting sequences for each that may run
POOLING_QUEUE = 4096  # its minimum for a model that pools, where one request has many short prompts


def _say_nothing(phase: str, done: int, total: int) -> None:
    """The Progress of loads that nobody watches: reloading after a sleep, and follower ranks."""


def build_engine(
    config: EngineConfig, *, progress: Progress, find_adapter: Callable[[str], Path] = Path,
    spawned: Sequence[Spawned] = (),
) -> AsyncEngine:  # fmt: skip
    """Build everything the engine needs. Raises StartupError (config, checkpoint, build, plan).

    progress      called with (phase, done, total); a total of 0 means that it is not known yet.
    find_adapter  turns a path or hub repository into an adapter's folder, as HostAdapters.find.
    spawned       the processes of the other ranks, if they have been started already.
    """
    progress("build", 0, 0)  # the amount of code to compile is not known yet
    logger = log.get_logger()
    trace = Trace(config.trace) if config.trace else None
    config = settle_sharing(config)
    start = settle_start(config)  # before anything is compiled, so that a refusal comes at once
    model_config = start.model_config
    if model_config.unknown_fields:
        names = ", ".join(name[:40] for name in model_config.unknown_fields[:10])
        logger.warning("config.json holds fields that pyserve does not know or use: %s", names)
    _log_plan(config, start.plan)
    ranks = Ranks(config, start.device, spawned)
    with ranks.ended_by_errors():
        return _build(config, start, ranks, trace, progress, find_adapter)


def _build(
    config: EngineConfig, start: Start, ranks: Ranks, trace: Trace | None, progress: Progress,
    find_adapter: Callable[[str], Path],
) -> AsyncEngine:  # fmt: skip
    logger = log.get_logger()
    model_config, memory, device_type = start.model_config, start.memory, start.device.type
    build.load_native(
        is_reference_allowed=config.allow_reference_ops,
        progress=logger.info,
        device="cuda" if device_type == "cuda" else "cpu",
        report=lambda done, total: progress("build", done, total),
    )
    quantization = model_config.quantization
    if quantization is not None:
        first = first_rounded_row(start.device) if quantization.scheme == "fp8" else None
        for remark in quantization.remarks(first):
            logger.warning("%s", remark)
    progress("build", 1, 1)
    plan = ranks.join(start.plan)
    with _card_may_be_full(plan):
        load = partial(load_weights, config, start, plan.max_model_len, group=ranks.group)
        model = load(progress=progress)
        ranks.wait_loaded()
        progress("warmup", 0, 0)
        executor = StepExecutor(
            model, plan, logprobs_mode=config.logprobs_mode, followers=ranks.followers
        )
        runner, plan = _start_runner(executor, config, plan, memory, progress, ranks)

        def new_engine() -> Engine:
            return _new_engine(config, plan, runner, model_config)

        def try_out() -> None:
            is_pooling = model_config.pooling is not None
            _warm_up(new_engine(), plan.max_model_len, is_pooling=is_pooling)

        try_out()
    progress("warmup", 1, 1)
    if plan.max_model_len < (config.max_model_len or model_config.max_model_len):
        logger.warning(
            "the model's context of %d tokens does not fit in memory: serving %d",
            model_config.max_model_len, plan.max_model_len,
        )  # fmt: skip
    weights = Weights(executor, load, ranks.wait_loaded)
    sleeper: Sleeper = HostSleeper(executor, weights, plan.num_blocks)
    if isinstance(runner, CudaRunner):
        sleeper = CardSleeper(executor, weights, plan.num_blocks, runner, try_out)
    adapters = _read_adapters(config, model, find_adapter) if config.enable_lora else None
    info = EngineInfo(
        max_model_len=plan.max_model_len,
        vocab_size=model_config.vocab_size,
        max_num_seqs=plan.num_slots,
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        dtype=_name(start.dtype),
        device=device_type,
        max_queue=config.max_queue or _default_queue(plan, model_config),
        has_priorities=config.scheduling_policy == "priority",
        enable_prefix_caching=config.enable_prefix_caching,
        gpu_memory_utilization=config.gpu_memory_utilization,
        has_logits=config.logprobs_mode.endswith("logits"),
        pooling=_pooling_info(model),
        num_adapter_slots=config.num_adapter_slots,
    )
    if trace is not None:
        trace.watch(runner, "pack", "pack")
    sleep = Sleep(sleeper, idle_s=60 * config.idle_sleep_min)
    return AsyncEngine(new_engine(), info, trace, sleep, adapters, ranks.followers)


@dataclass(frozen=True, slots=True)
class Start:
    """The decisions about a start that are made before anything is built.

    memory  what was available when the plan was made.
    """

    device: torch.device
    dtype: torch.dtype  # the dtype that the model computes in
    model_config: ModelConfig
    memory: Memory
    plan: MemoryPlan


def settle_sharing(config: EngineConfig) -> EngineConfig:
    """Choose tensor or pipeline parallelism if torchrun started several ranks and no flag chose.

    The ranks measure the link between them and take the way that is estimated to be faster. In all
    other cases `config` is returned as it is. Raises StartupError.
    """
    here = launched()
    if here is None or here.tp_size == 1 or config.num_ranks > 1:
        return config
    num_ranks = here.tp_size
    device = devices.resolve_device(config.device, is_demo=True, tp_rank=here.tp_rank)
    model_config = read_model(config)
    dtype = devices.resolve_dtype(config.dtype, model_config.dtype, device)
    work = Work.of(build_model(model_config, Placement(dtype, META), max_model_len=1))
    link = measure(ProcessGroup.launched(device), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    tensor_s, pipeline_s = estimate(link, work, num_ranks)
    is_tensor = num_ranks in tp_sizes(model_config) and (
        tensor_s <= pipeline_s or num_ranks > work.num_layers
    )
    chosen = "tensor" if is_tensor else "pipeline"
    if here.tp_rank == LEADER:
        log.get_logger().info(
            "an all-reduce of %d ranks takes %.0f us and %.3f GB/s: a prompt of %s tokens and an "
            "answer of %d would take %.2f s by tensor parallel, %.2f s by a pipeline; "
            "--%s-parallel-size %d it is", num_ranks, 1e6 * link.latency_s, link.bytes_per_s / 1e9,
            f"{PROMPT_TOKENS:,}", ANSWER_TOKENS, tensor_s, pipeline_s, chosen, num_ranks,
        )  # fmt: skip
    if is_tensor:
        return replace(config, tensor_parallel_size=num_ranks)
    return replace(config, pipeline_parallel_size=num_ranks)


def settle_start(config: EngineConfig, *, tp_rank: int = LEADER) -> Start:
    """Check the settings and make one rank's memory plan. Of the model it reads only config.json.

    Raises StartupError; where the model does not fit in memory, its message has the whole ledger.
    """
    is_demo = config.model_path == DEMO_MODEL
    device = devices.resolve_device(config.device, is_demo=is_demo, tp_rank=tp_rank)
    devices.check_cards(device, config.tensor_parallel_size, config.pipeline_parallel_size)
    model_config = read_model(config)
    check_sharing(model_config, config.tensor_parallel_size)
    check_pipeline(model_config, config.pipeline_parallel_size)
    devices.check_model(model_config, device)
    devices.check_logprobs_mode(config.logprobs_mode, device)
    dtype = devices.resolve_dtype(config.dtype, model_config.dtype, device)
    devices.check_adapters(config, model_config, dtype)
    memory = _memory(device, config.num_ranks)
    plan = _plan(config, model_config, _placement(config, dtype, META, tp_rank=tp_rank), memory)
    return Start(device, dtype, model_config, memory, plan)


def read_model(config: EngineConfig) -> ModelConfig:
    """The model's config.json, with --quantization and the answer ids of `config` applied.

    Raises StartupError.
    """
    model = ModelConfig.from_path(config.model_path, use=config.use)
    return model.quantised_as(config.quantization).answering_by(config.answer_ids)


def check_start(config: EngineConfig) -> Start:
    """Run settle_start, and check the checkpoint's headers against its result. Raises StartupError.

    Reads no weights: config.json and safetensors files of the right length in which only the
    headers are filled in, as before a download, are enough.
    """
    start = settle_start(config)
    if config.load_format != "dummy":
        check_checkpoint(config.model_path, start.model_config)
    return start


def _default_queue(plan: MemoryPlan, model_config: ModelConfig) -> int:
    num_waiting = QUEUE_FACTOR * plan.num_slots
    return num_waiting if model_config.pooling is None else max(num_waiting, POOLING_QUEUE)


def _pooling_info(model: Decoder) -> PoolingInfo | None:
    pooling = model.config.pooling
    if pooling is None or model.pooler is None:
        return None
    return PoolingInfo(
        pooling.kind, model.pooler.width, is_normalized=pooling.is_normalized,
        dimensions=pooling.dimensions,
    )  # fmt: skip


def _placement(
    config: EngineConfig, dtype: torch.dtype, device: torch.device, *, tp_rank: int,
    group: Group | None = None,
) -> Placement:  # fmt: skip
    is_pipeline = config.pipeline_parallel_size > 1
    return Placement(
        dtype,
        device,
        tp_rank=LEADER if is_pipeline else tp_rank,
        tp_size=config.tensor_parallel_size,
        pp_rank=tp_rank if is_pipeline else LEADER,
        pp_size=config.pipeline_parallel_size,
        group=group,
        num_adapter_slots=config.num_adapter_slots,
        max_adapter_rank=config.max_lora_rank if config.enable_lora else 0,
    )


def _read_adapters(
    config: EngineConfig, model: Decoder, find: Callable[[str], Path]
) -> HostAdapters:
    """The store of adapters, with those of --lora-modules loaded.

    Raises CheckpointError that names the adapter.
    """
    targets, dtype = model.adapter_targets(), model.dtype
    model_path = str(config.model_path.resolve())  # has the model's name, also in the hub's cache

    def read(folder: Path) -> AdapterWeights:
        weights = read_adapter(folder, targets, max_rank=config.max_lora_rank, dtype=dtype)
        if weights.unknown:
            names = ", ".join(name[:40] for name in weights.unknown[:10])
            log.get_logger().warning("%s: fields that pyserve does not know: %s", folder, names)
        base = weights.base_model.rstrip("/").rpartition("/")[2]
        if base not in model_path:
            log.get_logger().warning("%s was trained on %.200s", folder, weights.base_model)
        return weights

    adapters = HostAdapters(read, limit=config.num_kept_adapters, folder=config.lora_dir, find=find)
    for module in config.lora_modules:
        try:
            adapters.load_at_start(module.name, module.path)
        except CheckpointError as error:
            raise CheckpointError(f"--lora-modules {module.name}: {error}") from error
        log.get_logger().info("adapter %s: %s", module.name, module.path)
    return adapters


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory(device: torch.device, num_ranks: int) -> Memory:
    if device.type == "cuda":
        return devices.card_memory(device)
    return HostMemory(host.available_memory_bytes() // num_ranks)


def _plan(
    config: EngineConfig, model_config: ModelConfig, placement: Placement, memory: Memory
) -> MemoryPlan:
    # A model on the meta device takes no memory and tells exactly what the weights will take.
    shapes = build_model(model_config, placement, max_model_len=1)
    weight_bytes = sum(place.nbytes for place in shapes.destinations().values())
    return plan_memory(shapes, config, weight_bytes=weight_bytes, memory=memory)


def _log_plan(config: EngineConfig, plan: MemoryPlan) -> None:
    logger = log.get_logger()
    if plan.num_slots < config.max_num_seqs:
        logger.warning(
            "at most %s %s at once: --max-num-batched-tokens is %d",
            counted(plan.num_slots, "sequence"), "runs" if plan.num_slots == 1 else "run",
            plan.max_num_batched_tokens,
        )  # fmt: skip
    logger.info("memory, for %s:", _kv_blocks(config, plan))
    for line in format_ledger(plan.ledger).splitlines():
        logger.info("%s", line)


def _kv_blocks(config: EngineConfig, plan: MemoryPlan) -> str:
    return f"{counted(plan.num_blocks, 'KV block')} of {counted(config.block_size, 'token')}"


def load_weights(
    config: EngineConfig, start: Start, max_model_len: int, *, group: Group | None,
    progress: Progress = _say_nothing,
) -> Decoder:  # fmt: skip
    """Load the model, or the part of it that this rank of `group` holds. Raises CheckpointError.

    start, max_model_len  as settled for this rank, and as planned for all ranks together.
    """
    model_config, dtype, device = start.model_config, start.dtype, start.device
    num_bytes = 0

    def report(done: int, total: int) -> None:
        nonlocal num_bytes
        num_bytes = done
        progress("load", done, total)

    for line in model_config.choices(max_model_len):
        log.get_logger().info("%s", line)
    began_s = time.monotonic()
    model = load_model(
        config.model_path,
        model_config,
        _placement(
            config, dtype, device, tp_rank=LEADER if group is None else group.tp_rank, group=group
        ),
        load_format=config.load_format,
        seed=config.seed,
        progress=report,
        max_model_len=max_model_len,
    )
    took_s = time.monotonic() - began_s
    log.get_logger().info(
        "loaded %.2f GB of weights in %.1f s (%.1f GB/s) as %s on %s",
        num_bytes / 1e9, took_s, num_bytes / 1e9 / max(took_s, 1e-9), _name(dtype),
        devices.describe(device),
    )  # fmt: skip
    return model


def _start_runner(
    executor: StepExecutor, config: EngineConfig, plan: MemoryPlan, memory: Memory,
    progress: Progress, ranks: Ranks,
) -> tuple[Runner, MemoryPlan]:  # fmt: skip
    """Make the runner, allocate the KV cache and warm up; returns the plan with the final blocks.

    On a card the largest step runs first, and the KV cache then gets the memory that is really
    free. `memory` is what was available before the model was loaded. progress counts the steps of
    the warm-up.
    """

    def report(done: int, total: int) -> None:
        progress("warmup", done, total)

    if isinstance(memory, HostMemory):
        executor.allocate_kv(plan.num_blocks)
        cpu_runner = CpuRunner(executor, num_threads=ranks.num_threads)
        smallest_first = list(warmup_steps(executor.limits))[::-1]
        cpu_runner.warm_up(smallest_first, budget_s=CPU_WARMUP_BUDGET_S, report=report)
        return cpu_runner, plan
    runner = CudaRunner(executor, is_eager=not config.has_graphs)
    runner.warm_up_largest()
    plan = fit_kv(plan, config, before=memory, now=devices.card_memory(executor.device))
    for before, now, block_bytes in ranks.measured():
        plan = fit_kv(plan, config, before=before, now=now, block_bytes=block_bytes)
    runner.allocate_kv(plan.num_blocks, report=report)
    now = devices.card_memory(executor.device)
    is_true, line = is_ledger_true(plan, before=memory, now=now)
    say = log.get_logger().info if is_true else log.get_logger().warning
    say("memory, with %s: %s", _kv_blocks(config, plan), line)
    return runner, plan


@contextmanager
def _card_may_be_full(plan: MemoryPlan) -> Iterator[None]:
    """Turn CUDA errors of the start into StartupErrors that say what to do.

    Running out of memory is possible despite the plan, as other processes may have taken some.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PlanError(
            "the card ran out of memory while the model was loaded: other processes took it, or "
            "the plan is wrong; see nvidia-smi, and try a lower --gpu-memory-utilization; the "
            f"plan was\n{format_ledger(plan.ledger)}"
        ) from error
    except DeviceError as error:
        raise StartupError(f"the warm-up failed: {error}") from error


def _new_engine(
    config: EngineConfig, plan: MemoryPlan, runner: Runner, model_config: ModelConfig
) -> Engine:
    scheduler = Scheduler(
        BlockManager(
            plan.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        ),
        SlotAllocator(plan.num_slots),
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_update_words=max_update_words(plan.max_model_len, config.block_size),
        adapters=AdapterSlots(config.num_adapter_slots),
    )
    pacer = None
    if config.target_itl_ms:
        pacer = ChunkPacer(config.target_itl_ms / 1e3, max_tokens=plan.max_num_batched_tokens)
    return Engine(
        scheduler, runner, pacer=pacer, max_model_len=plan.max_model_len,
        vocab_size=model_config.vocab_size, policy=config.scheduling_policy,
        is_pooling=model_config.pooling is not None,
    )  # fmt: skip


def _warm_up(engine: Engine, max_model_len: int, *, is_pooling: bool) -> None:
    """Run one short sequence through an engine that is then thrown away.

    It may leave its data in the KV cache and the slots, which are always written before being read.
    """
    num_prompt_tokens = max(1, min(WARMUP_PROMPT_LEN, max_model_len - 2))
    num_output_tokens = min(2, max_model_len - num_prompt_tokens)
    if num_output_tokens:
        params = POOLED if is_pooling else SamplingParams(max_tokens=num_output_tokens, seed=0)
        engine.add(SequenceRequest([0] * num_prompt_tokens, params))
    while engine.step():
        pass
