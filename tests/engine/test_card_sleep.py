"""A card that sleeps, without a card: what is freed and made again, in which order, and what
becomes of requests where it cannot be made. Memory on a real one: tests/gpu/test_sleep.py.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.client import EngineInfo, SequenceRequest, SequenceStream
from pyserve.engine import devices
from pyserve.engine.async_engine import WAKE_AGAIN_S, AsyncEngine
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine
from pyserve.engine.planner import CardMemory
from pyserve.engine.sleep import CardSleeper, Sleep, Weights
from pyserve.errors import CheckpointError, DeviceError, EngineError, UnavailableError
from pyserve.model.decoder import Decoder
from pyserve.params import SamplingParams
from tests.engine.fake_card import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    NUM_SLOTS,
    load,
    make_engine,
    new_engine,
)
from tests.engine.hard_moments import read_all
from tests.engine.tiny import VOCAB_SIZE
from tests.waiting import until

WAIT_S = 30
PARAMS = SamplingParams(max_tokens=30, temperature=0.0)


class Card:
    """An engine on a stand-in for a card, whose sleeper notes what it does.

    calls     what it has done.
    failing   by such a call: what it raises next time.
    """

    def __init__(self, engine: Engine, folder: Path, *, idle_s: float = 0.0) -> None:
        assert isinstance(engine.runner, CudaRunner)
        self.runner, self.folder = engine.runner, folder
        self.calls: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.executor = self.runner._executor
        for name in ("warm_up_largest", "allocate_kv"):
            setattr(self.runner, name, self._noted(name, getattr(self.runner, name)))
        load_again = self._noted("load", self._load)
        weights = Weights(self.executor, load_again, self._noted("wait_loaded", lambda: None))
        try_out = self._noted("try_out", self._try_out)
        self.sleeper = CardSleeper(self.executor, weights, NUM_BLOCKS, self.runner, try_out)
        info = EngineInfo(
            max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=NUM_SLOTS,
            block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, dtype="float32", device="cuda",
        )  # fmt: skip
        self.client = AsyncEngine(engine, info, sleep=Sleep(self.sleeper, idle_s=idle_s))
        self.models = [weakref.ref(self.executor._model)]

    def is_empty(self) -> bool:
        """Whether nothing of the model, of what steps write and of the KV cache is there."""
        held = {"_model", "_state", "_hidden"} & vars(self.executor).keys()
        executor = self.executor
        caches = [executor._kv_caches, executor._forwards, executor._activations, executor._tiles]
        return not held and not any(caches) and all(model() is None for model in self.models)

    def submit(self, token_id: int = 7) -> SequenceStream:
        return self.client.submit(SequenceRequest([token_id] * 20, PARAMS))

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            self.calls.append(name)
            if name in self.failing:
                raise self.failing.pop(name)
            return call(*args)

        return noted

    def _load(self) -> Decoder:
        model = load(self.folder)
        self.models.append(weakref.ref(model))
        return model

    def _try_out(self) -> None:
        engine = new_engine(self.runner)
        engine.add(SequenceRequest([0] * 16, SamplingParams(max_tokens=2, seed=0)))
        while engine.step():
            pass


WAKING = ["load", "wait_loaded", "warm_up_largest", "allocate_kv", "try_out"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    monkeypatch.setattr(devices, "card_memory", lambda device: CardMemory(2**37, 2**29))
    return make_engine(monkeypatch, tmp_path, is_eager=True)


async def tokens_of(stream: SequenceStream) -> list[int]:
    token_ids, _ = await asyncio.wait_for(read_all(stream), WAIT_S)
    return token_ids


def test_all_is_given_back_at_either_level_and_made_again(engine: Engine, tmp_path: Path) -> None:
    async def run() -> None:
        card = Card(engine, tmp_path)
        client = card.client
        client.start()
        expected = await tokens_of(card.submit())
        for level in (1, 2, 1):
            card.calls.clear()
            running = card.submit()
            first = await asyncio.wait_for(running.read(), WAIT_S)
            await asyncio.wait_for(client.sleep(level), WAIT_S)
            assert client.stats().sleep_level == level and card.is_empty()
            waiting = card.submit()
            await asyncio.wait_for(client.wake_up(), WAIT_S)
            assert card.calls == WAKING and not card.is_empty()
            assert first.token_ids + await tokens_of(running) == expected
            assert await tokens_of(waiting) == expected
        await asyncio.wait_for(client.sleep(2), WAIT_S)
        await asyncio.wait_for(client.stop(), WAIT_S)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "other processes have"),
        (RuntimeError("CUDA error: out of memory"), "other processes have taken it"),
    ],
)
def test_where_the_memory_is_gone_it_sleeps_on_and_may_be_asked_again(
    engine: Engine, tmp_path: Path, error: Exception, match: str
) -> None:
    async def run() -> None:
        card = Card(engine, tmp_path)
        client = card.client
        client.start()
        expected = await tokens_of(card.submit())
        await asyncio.wait_for(client.sleep(1), WAIT_S)
        waiting = card.submit()
        card.failing["allocate_kv"] = error
        with pytest.raises(UnavailableError, match=f"cannot wake up: .*{match}") as raised:
            await asyncio.wait_for(client.wake_up(), WAIT_S)
        assert raised.value.retry_after_s == WAKE_AGAIN_S
        assert client.stats().sleep_level == 2 and client.stats().num_waiting == 1
        assert card.models[-1]() is None and card.is_empty()
        await asyncio.wait_for(client.sleep(1), WAIT_S)  # says no more of what was before
        await asyncio.wait_for(client.wake_up(), WAIT_S)
        assert await tokens_of(waiting) == expected
        await asyncio.wait_for(client.stop(), WAIT_S)

    asyncio.run(run())


def test_a_request_that_cannot_wake_it_fails_and_the_next_one_tries_again(
    engine: Engine, tmp_path: Path
) -> None:
    async def run() -> None:
        card = Card(engine, tmp_path, idle_s=0.05)
        client = card.client
        client.start()
        expected = await tokens_of(card.submit())
        await until(lambda: client.stats().sleep_level == 2)
        card.failing["load"] = CheckpointError("the checkpoint lacks: model.norm.weight")
        with pytest.raises(UnavailableError, match="cannot wake up: the checkpoint lacks"):
            await tokens_of(card.submit())
        assert card.calls[-2:] == ["load", "wait_loaded"]
        assert client.stats().sleep_level == 2 and client.stats().num_waiting == 0
        engine.check_invariants()
        assert await tokens_of(card.submit()) == expected
        await until(lambda: client.stats().sleep_level == 2)
        await asyncio.wait_for(client.wake_up(), WAIT_S)
        await asyncio.wait_for(client.stop(), WAIT_S)

    asyncio.run(run())


def test_a_card_that_fails_while_it_wakes_up_ends_the_engine(
    engine: Engine, tmp_path: Path
) -> None:
    async def run() -> None:
        card = Card(engine, tmp_path)
        client = card.client
        client.start()
        await asyncio.wait_for(client.sleep(2), WAIT_S)
        waiting = card.submit()
        card.failing["try_out"] = DeviceError("the GPU failed: an illegal address")
        with pytest.raises(UnavailableError, match="illegal address"):
            await asyncio.wait_for(client.wake_up(), WAIT_S)
        with pytest.raises(EngineError, match="illegal address"):
            await tokens_of(waiting)
        assert "illegal address" in await asyncio.wait_for(client.wait_stopped(), WAIT_S)
        await asyncio.wait_for(client.stop(), WAIT_S)

    asyncio.run(run())
