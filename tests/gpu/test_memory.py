"""Memory on a card: the ledger against what the card shows, what others hold, what does not fit."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyserve.client import SequenceRequest
from pyserve.config import EngineConfig
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.load import build_engine
from pyserve.errors import ConfigError, PlanError
from pyserve.params import SamplingParams

CARD = torch.device("cuda", 0)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SMALL = LLAMA | {"num_hidden_layers": 2, "intermediate_size": 1024, "hidden_size": 512}
SMALL |= {"num_attention_heads": 8, "max_position_embeddings": 4096, "head_dim": 64}


@pytest.fixture(autouse=True)
def empty_card() -> Iterator[None]:
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def build(folder: Path, shape: dict[str, object], **settings: object) -> AsyncEngine:
    (folder / "config.json").write_text(json.dumps(shape))
    config = EngineConfig(model_path=folder, device="cuda", load_format="dummy", **settings)  # type: ignore[arg-type]
    return build_engine(config, progress=lambda *report: None)


async def answer(engine: AsyncEngine, num_prompt_tokens: int, num_seqs: int) -> None:
    engine.start()
    streams = [
        engine.submit(
            SequenceRequest([7 + index] * num_prompt_tokens, SamplingParams(max_tokens=8))
        )
        for index in range(num_seqs)
    ]
    for stream in streams:
        while (await asyncio.wait_for(stream.read(), 60)).finish_reason is None:
            pass


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info(CARD)
    return total - free


def ledger_line(caplog: pytest.LogCaptureFixture) -> tuple[str, float, float]:
    """Level of the line that compares them, what the ledger says and what the card shows in GiB."""
    found = [
        (record.levelname, match)
        for record in caplog.records
        if (match := re.search(r"ledger says ([\d.,]+) GiB, the card shows ([\d.,]+) GiB",
                               record.getMessage()))
    ]  # fmt: skip
    assert len(found) == 1
    level, match = found[0]
    said, shown = (float(text.replace(",", "")) for text in match.groups())
    return level, said, shown


@pytest.mark.parametrize("shape", [LLAMA, SMALL], ids=["8b", "small"])
def test_the_ledger_is_true_and_nothing_is_allocated_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shape: dict[str, object]
) -> None:
    total = torch.cuda.get_device_properties(CARD).total_memory
    if total < 24e9:
        pytest.skip("needs a card of 24 GB")
    with caplog.at_level(logging.INFO, "pyserve"):
        engine = build(tmp_path, shape)
    level, said, shown = ledger_line(caplog)
    assert level == "INFO" and said == pytest.approx(shown, rel=0.03)
    assert used_bytes() <= 0.9 * total * 1.01
    assert engine.info.device == "cuda" and engine.info.dtype == "bfloat16"

    async def serve() -> None:
        before = torch.cuda.memory_stats(CARD)["num_device_alloc"]
        used = used_bytes()
        await answer(engine, 1000, 20)
        assert torch.cuda.memory_stats(CARD)["num_device_alloc"] == before
        assert used_bytes() <= used + 16 * 2**20  # code that is loaded at its first call
        await engine.stop()

    asyncio.run(serve())


def test_what_others_hold_is_left_to_them(tmp_path: Path) -> None:
    free, total = torch.cuda.mem_get_info(CARD)
    held = torch.empty(int(0.5 * free), dtype=torch.uint8, device=CARD)
    engine = build(tmp_path, SMALL, gpu_memory_utilization=0.8)
    assert used_bytes() <= 0.8 * total + 256 * 2**20
    assert engine.info.num_blocks > 1000
    asyncio.run(engine.stop())
    del held


def test_a_card_that_others_have_filled(tmp_path: Path) -> None:
    free, _ = torch.cuda.mem_get_info(CARD)
    held = torch.empty(int(0.95 * free), dtype=torch.uint8, device=CARD)
    with pytest.raises(
        PlanError, match="that other processes hold.*nothing would fit.* or end the"
    ):
        build(tmp_path, SMALL)
    del held


def test_a_context_that_does_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a share of the card that has the weights and 3 GB."""
    share = 20e9 / torch.cuda.get_device_properties(CARD).total_memory
    if share > 0.9:
        pytest.skip("needs a card of 24 GB")
    with pytest.raises(PlanError, match="a context of 131072 tokens does not fit") as caught:
        build(tmp_path, LLAMA, gpu_memory_utilization=share, max_model_len=131072)
    assert "KV cache" in str(caught.value)
    engine = build(
        tmp_path, LLAMA, gpu_memory_utilization=share, max_num_batched_tokens=512, max_num_seqs=16
    )
    assert 1000 < engine.info.max_model_len < 131072
    assert "the model's context of 131072 tokens does not fit in memory: serving" in caplog.text
    asyncio.run(engine.stop())


def test_what_the_kernels_cannot_do_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        build(tmp_path, SMALL | {"head_dim": 96})
    with pytest.raises(ConfigError, match="--dtype float32"):
        build(tmp_path, SMALL, dtype="float32")
