"""Embeddings and scores on a card: by the ratio rule, recorded or not, awaited or run ahead of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from pyserve.client import EngineInfo, SequenceRequest, SequenceStream
from pyserve.config import Use
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.model.config import ModelConfig
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.params import POOLED
from tests.engine.test_pooling import NO, YES, prompts
from tests.model.oracle import VOCAB_SIZE, make_model

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)
MAX_MODEL_LEN, NUM_SLOTS, NUM_BLOCKS = 128, 8, 64
SHAPE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "tie_word_embeddings": True}


def engine_for(folder: Path, use: Use, *, depth: int, is_eager: bool, budget: int) -> AsyncEngine:
    config = ModelConfig.from_path(folder, use=use).answering_by((NO, YES))
    decoder = load_model(
        folder, config, Placement(torch.bfloat16, CARD), load_format="auto", seed=0,
        progress=lambda done, total: None,
    )  # fmt: skip
    limits = StepLimits(
        block_size=16, num_slots=NUM_SLOTS, max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN, logits_tile_rows=3,
    )  # fmt: skip
    runner = CudaRunner(StepExecutor(decoder, limits), is_eager=is_eager)
    runner.run_ahead_depth = depth
    runner.allocate_kv(NUM_BLOCKS)
    scheduler = Scheduler(
        BlockManager(NUM_BLOCKS, 16, enable_prefix_caching=True),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=budget,
        max_update_words=max_update_words(MAX_MODEL_LEN, 16),
    )
    engine = Engine(
        scheduler, runner, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, policy="fcfs",
        is_pooling=True,
    )  # fmt: skip
    info = EngineInfo(
        max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=NUM_SLOTS, block_size=16,
        num_blocks=NUM_BLOCKS, dtype="bfloat16", device="cuda",
    )  # fmt: skip
    return AsyncEngine(engine, info)


async def pooled(engine: AsyncEngine) -> torch.Tensor:
    """[number of prompts, width], twice over: the second time prefixes are cached."""
    engine.start()
    rounds = []
    for _ in range(2):
        streams = [engine.submit(SequenceRequest(prompt, POOLED)) for prompt in prompts()]
        rounds.append(torch.stack([await vector_of(stream) for stream in streams]))
    assert engine.stats().cached_tokens > 0 and engine.stats().num_blocks_used == 0
    await engine.stop()
    return torch.cat(rounds)


async def vector_of(stream: SequenceStream) -> torch.Tensor:
    while (await stream.read()).finish_reason is None:
        pass
    assert stream.pooled is not None
    return torch.tensor(stream.pooled)


def theirs(folder: Path, use: Use, dtype: torch.dtype) -> torch.Tensor:
    kind = AutoModel if use == "embed" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=dtype).to(CARD).eval()
    rows = []
    with torch.inference_mode():
        for prompt in prompts():
            output = model(torch.tensor([prompt], device=CARD))
            if use == "embed":
                rows.append(output.last_hidden_state[0, -1])
            else:
                rows.append(output.logits[0, -1, YES : YES + 1] - output.logits[0, -1, NO])
    return torch.stack(rows).double().cpu()


@pytest.mark.parametrize("use", ["embed", "score"])
def test_as_plain_torch_in_the_same_dtype(use: Use, tmp_path: Path) -> None:
    make_model("qwen3", **SHAPE).save_pretrained(tmp_path)
    exact = theirs(tmp_path, use, torch.float32)
    error = (theirs(tmp_path, use, torch.bfloat16) - exact).norm() / exact.norm()
    for depth, is_eager, budget in ((0, True, 512), (1, True, 20), (0, False, 512), (1, False, 20)):
        engine = engine_for(tmp_path, use, depth=depth, is_eager=is_eager, budget=budget)
        ours = asyncio.run(asyncio.wait_for(pooled(engine), 60)).double()
        both = torch.cat([exact, exact])
        ratio = float((ours - both).norm() / both.norm() / error)
        assert ratio <= 2.0, (depth, is_eager, budget, ratio)
