"""build_engine: from an EngineConfig to an engine that is ready to start. Runs on a worker thread.

Phases, as reported: build (native products), load (weights, in bytes), warmup (one sequence through
every part of a step).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyserve import log
from pyserve.client import EngineInfo
from pyserve.config import Dtype, EngineConfig
from pyserve.engine import host
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import LOGITS_TILE_ROWS, max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.engine import Engine, Runner
from pyserve.engine.planner import MemoryPlan, format_ledger, plan_memory
from pyserve.engine.runner import CpuRunner, StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.errors import ConfigError
from pyserve.model.config import CheckpointDtype, ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.ops import build
from pyserve.params import SamplingParams

Progress = Callable[[str, int, int], None]  # phase, done, total

WARMUP_PROMPT_LEN = 16


def build_engine(config: EngineConfig, *, progress: Progress) -> AsyncEngine:
    """Build everything the engine needs. Raises StartupError (config, checkpoint, build, plan)."""
    progress("build", 0, 1)
    build.load_native(allow_reference=config.allow_reference_ops, progress=log.get_logger().info)
    progress("build", 1, 1)

    model_config = ModelConfig.from_path(config.model_path)
    dtype = resolve_dtype(config.dtype, model_config.dtype)
    device = torch.device(config.device)
    plan = _plan(config, model_config, dtype)
    model = load_model(
        config.model_path,
        model_config,
        dtype=dtype,
        device=device,
        load_format=config.load_format,
        seed=config.seed,
        progress=lambda done, total: progress("load", done, total),
        max_model_len=plan.max_model_len,
    )

    progress("warmup", 0, 1)
    executor = StepExecutor(
        model,
        block_size=config.block_size,
        num_slots=plan.num_slots,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        logits_tile_rows=LOGITS_TILE_ROWS,
    )
    executor.allocate_kv(plan.num_blocks)
    runner = CpuRunner(executor, num_threads=host.num_threads())

    def new_engine() -> Engine:
        return _new_engine(config, plan, runner, model_config.vocab_size)

    _warm_up(new_engine(), plan.max_model_len)
    progress("warmup", 1, 1)
    info = EngineInfo(
        max_model_len=plan.max_model_len,
        vocab_size=model_config.vocab_size,
        max_num_seqs=plan.num_slots,
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        dtype=str(dtype).removeprefix("torch."),
        device=config.device,
        has_priorities=config.scheduling_policy == "priority",
    )
    return AsyncEngine(new_engine(), info)


def resolve_dtype(wanted: Dtype, stored: CheckpointDtype) -> torch.dtype:
    """The dtype to compute in on a CPU. Raises ConfigError for float16."""
    if wanted == "float16":
        raise ConfigError("--dtype float16 is not supported on a CPU: use bfloat16 or float32")
    if wanted == "auto" and stored == "float16":
        log.get_logger().info("the checkpoint is float16: computing in float32 on a CPU")
        return torch.float32
    dtype = stored if wanted == "auto" else wanted
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _plan(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype) -> MemoryPlan:
    # Shapes without memory: what the weights will take, exactly.
    shapes = Decoder(model_config, dtype=dtype, device=torch.device("meta"), max_model_len=1)
    plan = plan_memory(
        model_config,
        config,
        weight_bytes=sum(place.view.nbytes for place in shapes.destinations().values()),
        kv_specs=shapes.kv_specs(),
        itemsize=dtype.itemsize,
        available_bytes=host.available_memory_bytes(),
    )
    logger = log.get_logger()
    if plan.num_slots < config.max_num_seqs:
        logger.warning(
            "at most %d sequences run at once: --max-num-batched-tokens is %d",
            plan.num_slots, config.max_num_batched_tokens,
        )  # fmt: skip
    if plan.max_model_len < (config.max_model_len or model_config.max_model_len):
        logger.warning(
            "the model's context of %d tokens does not fit in memory: serving %d",
            model_config.max_model_len, plan.max_model_len,
        )  # fmt: skip
    logger.info(
        "memory, for %d KV blocks of %d tokens:\n%s",
        plan.num_blocks, config.block_size, format_ledger(plan.ledger),
    )  # fmt: skip
    return plan


def _new_engine(config: EngineConfig, plan: MemoryPlan, runner: Runner, vocab_size: int) -> Engine:
    scheduler = Scheduler(
        BlockManager(
            plan.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        ),
        SlotAllocator(plan.num_slots),
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_update_words=max_update_words(plan.max_model_len, config.block_size),
    )
    return Engine(
        scheduler, runner, max_model_len=plan.max_model_len, vocab_size=vocab_size,
        policy=config.scheduling_policy,
    )  # fmt: skip


def _warm_up(engine: Engine, max_model_len: int) -> None:
    """Run one short sequence through an engine that is then thrown away.

    What it leaves in the KV cache and the slots is written before it is read again.
    """
    num_prompt_tokens = max(1, min(WARMUP_PROMPT_LEN, max_model_len - 2))
    num_output_tokens = min(2, max_model_len - num_prompt_tokens)
    if num_output_tokens:
        engine.add([0] * num_prompt_tokens, SamplingParams(max_tokens=num_output_tokens, seed=0))
    while engine.step():
        pass
