"""From a folder and settings to an engine that answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve import host
from pyserve.client import EngineClient, EngineInfo, SequenceRequest
from pyserve.engine import devices, load
from pyserve.engine.executor import StepExecutor
from pyserve.engine.load import build_engine
from pyserve.engine.planner import CardMemory, MemoryPlan, plan_memory
from pyserve.engine.state import StepLimits
from pyserve.engine.tensor_parallel.ranks import Ranks
from pyserve.errors import CheckpointError, ConfigError, DeviceError, PlanError, StartupError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.loader import load_model
from pyserve.model.placement import META, Placement
from pyserve.params import SamplingParams
from tests.engine.tiny import CONFIG, VOCAB_SIZE, engine_config, write_model


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


def build(folder: Path, **overrides: object) -> tuple[EngineClient, list[tuple[str, int, int]]]:
    reports: list[tuple[str, int, int]] = []
    engine = build_engine(
        engine_config(folder, **overrides), progress=lambda *report: reports.append(report)
    )
    return engine, reports


def answer(engine: EngineClient, **kwargs: Any) -> list[int]:
    async def run() -> list[int]:
        engine.start()
        stream = engine.submit(
            SequenceRequest([1, 2, 3], SamplingParams(**({"max_tokens": 5} | kwargs)))
        )
        token_ids: list[int] = []
        finish_reason = None
        while finish_reason is None:
            delta = await stream.read()
            token_ids += delta.token_ids
            finish_reason = delta.finish_reason
        await engine.stop()
        return token_ids

    return asyncio.run(asyncio.wait_for(run(), 20))


def test_build_and_answer(tmp_path: Path) -> None:
    engine, reports = build(write_model(tmp_path))
    assert engine.info == EngineInfo(
        max_model_len=256, vocab_size=VOCAB_SIZE, max_num_seqs=8, block_size=16, num_blocks=128,
        dtype="float32", device="cpu", has_priorities=False, max_queue=32,
    )  # fmt: skip
    phases = list(dict.fromkeys(phase for phase, _, _ in reports))
    assert phases == ["build", "load", "warmup"]
    for phase in phases:
        told = [(done, total) for name, done, total in reports if name == phase]
        shares = [done / total if total else 0.0 for done, total in told]
        assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)
    warmup = [done for name, done, _ in reports if name == "warmup"]
    assert len(warmup) > 3, "one report for each shape"
    stats = engine.stats()
    assert stats.num_steps == stats.prompt_tokens == stats.num_blocks_used == 0, "warm-up is gone"
    token_ids = answer(engine, temperature=0.0)
    assert len(token_ids) == 5 and all(0 <= i < VOCAB_SIZE for i in token_ids)
    again, _ = build(tmp_path)
    assert answer(again, temperature=0.0) == token_ids
    other, _ = build(tmp_path, seed=1)
    assert answer(other, temperature=0.0) != token_ids


@pytest.mark.parametrize("max_model_len", [1, 2, 3, 17])
def test_tiny_contexts(tmp_path: Path, max_model_len: int) -> None:
    engine, _ = build(write_model(tmp_path), max_model_len=max_model_len)
    assert engine.info.max_model_len == max_model_len
    if max_model_len >= 4:
        assert len(answer(engine, max_tokens=max_model_len - 3)) == max_model_len - 3


def test_bfloat16(tmp_path: Path) -> None:
    engine, _ = build(write_model(tmp_path, torch_dtype="bfloat16"), max_queue=3)
    assert engine.info.dtype == "bfloat16"
    assert engine.info.max_queue == 3
    assert len(answer(engine)) == 5


def test_a_context_that_shrinks_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pyserve"):
        engine, _ = build(
            write_model(tmp_path), kv_cache_memory_bytes=3 * 8192, max_num_batched_tokens=4
        )
    assert engine.info.max_model_len == 48 and engine.info.max_num_seqs == 4
    assert engine.info.max_queue == 16  # four for each slot
    assert "the model's context of 256 tokens does not fit in memory: serving 48" in caplog.text
    assert "at most 4 sequences run at once" in caplog.text
    assert "KV cache" in caplog.text
    assert len(answer(engine)) == 5


class FakeCudaRunner:
    """Notes what is asked of it; a card of 1 GiB shows what it holds."""

    total_bytes = 2**30
    used_bytes = 300 * 2**20
    calls: list[str]

    def __init__(self, executor: StepExecutor, *, is_eager: bool) -> None:
        assert not is_eager
        type(self).calls = ["create"]
        self.executor = executor

    def warm_up_largest(self) -> None:
        self.calls.append("warm up")

    def allocate_kv(self, num_blocks: int, *, report: Callable[[int, int], None]) -> None:
        self.calls.append(f"{num_blocks} blocks")
        report(0, 2)
        report(1, 2)

    @classmethod
    def memory(cls, device: torch.device) -> CardMemory:
        cls.calls.append("look")
        return CardMemory(cls.total_bytes, cls.used_bytes)


@pytest.mark.parametrize("used_bytes", [300 * 2**20, 900 * 2**20])
def test_a_card_s_kv_cache_comes_last(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    used_bytes: int,
) -> None:
    monkeypatch.setattr(load, "CudaRunner", FakeCudaRunner)
    monkeypatch.setattr(devices, "card_memory", FakeCudaRunner.memory)
    monkeypatch.setattr(FakeCudaRunner, "used_bytes", used_bytes)
    before = CardMemory(2**30, 200 * 2**20)
    model = load_model(
        tmp_path, ModelConfig.from_hf(CONFIG), Placement(torch.float32, torch.device("cpu")),
        load_format="dummy", seed=0, progress=lambda done, total: None,
    )  # fmt: skip
    config = engine_config(tmp_path)
    reports: list[tuple[str, int, int]] = []
    shapes = build_model(model.config, Placement(torch.float32, META), max_model_len=1)
    plan = plan_memory(shapes, config, weight_bytes=0, memory=before)
    executor = StepExecutor(
        model,
        StepLimits(
            block_size=16,
            num_slots=8,
            max_num_batched_tokens=64,
            max_model_len=256,
            logits_tile_rows=8,
        ),
    )
    with caplog.at_level(logging.INFO, "pyserve"):
        runner, fitted = load._start_runner(
            executor,
            config,
            plan,
            before,
            lambda *told: reports.append(told),
            Ranks(config, torch.device("cpu")),
        )
    assert reports == [("warmup", 0, 2), ("warmup", 1, 2)]
    left_bytes = int(0.9 * 2**30) - used_bytes - dict(plan.ledger)["CUDA graphs"]
    assert fitted.num_blocks == min(plan.num_blocks, left_bytes // plan.block_bytes) > 0
    blocks = f"{fitted.num_blocks} blocks"
    assert FakeCudaRunner.calls == ["create", "warm up", "look", blocks, "look"]
    assert isinstance(runner, FakeCudaRunner) and runner.executor is executor
    # The fake card never shows the KV cache.
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"with {fitted.num_blocks} KV blocks of 16 tokens: the ledger says" in caplog.text


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), PlanError, "ran out of memory while"),
        (DeviceError("the GPU failed: CUDA_ERROR_X"), StartupError, "the warm-up failed: the GPU"),
    ],
)
def test_what_a_card_does_not_take_is_a_line(
    error: Exception, expected: type[StartupError], message: str
) -> None:
    plan = MemoryPlan(
        num_slots=1, max_num_batched_tokens=1, logits_tile_rows=1, max_model_len=1, block_size=1,
        num_blocks=1, block_bytes=1, ledger=(("weights", 3 * 2**20),),
    )  # fmt: skip
    with pytest.raises(expected, match=message), load._card_may_be_full(plan):
        raise error


def test_what_cannot_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path)
    with pytest.raises(ConfigError, match="--max-model-len is 257"):
        build(folder, max_model_len=257)
    with pytest.raises(CheckpointError):
        build(folder, load_format="auto")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build(tmp_path / "nothing")
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 2**16)
    with pytest.raises(PlanError, match="does not fit"):
        build(folder)
