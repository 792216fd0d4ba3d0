"""The engine on a model with adapters, at float32: the tokens of each are those of a model with the
same adapter merged into its matrices, whatever runs beside it and however it is scheduled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.client import Adapter, EngineInfo, SequenceRequest
from pyserve.engine.adapter_slots import AdapterSlots
from pyserve.engine.adapters import HostAdapters
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cpu_runner import CpuRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.planner import HostMemory, plan_memory
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.errors import NotFoundError
from pyserve.model.adapter_weights import AdapterWeights, Pair
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.placement import META, Placement
from pyserve.params import SamplingParams
from tests.engine.driver import Driver, Reader
from tests.engine.tiny import CONFIG, VOCAB_SIZE, engine_config, write_model

MAX_MODEL_LEN, BLOCK_SIZE, MAX_RANK = 256, 16, 32
NUM_ADAPTERS = 8
MAX_GAP = 1e-4  # of the top two logits, below which another choice is rounding


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_decoder(num_adapter_slots: int = 0) -> Decoder:
    """Weights so large that the next token depends on all before it."""
    placement = Placement(
        torch.float32, torch.device("cpu"), num_adapter_slots=num_adapter_slots,
        max_adapter_rank=MAX_RANK if num_adapter_slots else 0,
    )  # fmt: skip
    decoder = build_model(ModelConfig.from_hf(CONFIG), placement)
    generator = torch.Generator().manual_seed(5)
    for name, place in decoder.destinations().items():
        noise = torch.randn(place.view.shape, generator=generator)
        place.view.copy_(1 + 0.1 * noise if "norm" in name else 0.35 * noise)
    return decoder


def make_weights(decoder: Decoder, seed: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    rank = 1 + 7 * seed % MAX_RANK
    pairs = {
        name: Pair(
            torch.randn(rank, target.in_features, generator=generator) / target.in_features**0.5,
            torch.randn(target.out_features, rank, generator=generator) / rank**0.5,
            0.5 + seed / 8,
        )
        for name, target in decoder.adapter_targets().items()
        if seed % 2 or "layers.0" in name
    }
    return AdapterWeights(pairs, "")


def merge(decoder: Decoder, weights: AdapterWeights) -> Decoder:
    """`decoder`, its matrices W + scale * B A."""
    for name, place in decoder.destinations().items():
        pair = weights.pairs.get(name.removesuffix(".weight"))
        if pair is not None:
            view = place.view
            merged = view.double() + pair.scale * (pair.b.double() @ pair.a.double())
            view.copy_(merged.float())
    return decoder


def make_engine(
    decoder: Decoder, *, num_blocks: int = 128, budget: int = 512, caching: bool = False
) -> Engine:
    limits = StepLimits(
        block_size=BLOCK_SIZE, num_slots=8, max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN, logits_tile_rows=64,
    )  # fmt: skip
    executor = StepExecutor(decoder, limits)
    executor.allocate_kv(num_blocks)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching),
        SlotAllocator(8),
        max_num_batched_tokens=budget,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
        adapters=AdapterSlots(decoder.num_adapter_slots),
    )
    return Engine(
        scheduler, CpuRunner(executor, num_threads=1), max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE, policy="fcfs",
    )  # fmt: skip


PROMPT = random.Random(0).choices(range(VOCAB_SIZE), k=40)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, num_logprobs=2)


def generate(
    engine: Engine, adapters: list[Adapter | None], *, depth: int = 0, alone: bool = False
) -> list[Reader]:
    driver = Driver(engine, depth)
    for number, adapter in enumerate(adapters):
        driver.submit([*PROMPT, number % 3], GREEDY, adapter=adapter)
        if alone:
            driver.drain()
    driver.drain()
    engine.check_invariants()
    engine.runner.close()
    return driver.readers


def is_near_tie(reader: Reader, expected: Reader) -> bool:
    """Whether the first token that differs is one of two that are as good."""
    pairs = zip(reader.output, expected.output, strict=False)
    index = next(i for i, (mine, theirs) in enumerate(pairs) if mine != theirs)
    first, second = expected.logprobs[index].top_logprobs[:2]
    return first - second < MAX_GAP


@pytest.fixture(scope="module")
def adapters() -> list[Adapter | None]:
    """The base model and its adapters."""
    decoder = make_decoder(1)
    return [None, *(Adapter(f"a{i}", i, make_weights(decoder, i)) for i in range(NUM_ADAPTERS))]


@pytest.fixture(scope="module")
def merged(adapters: list[Adapter | None]) -> list[Reader]:
    """Of each its answer alone, by a model that has it in its matrices."""
    readers = []
    for number, adapter in enumerate(adapters):
        decoder = make_decoder()
        if adapter is not None:
            merge(decoder, adapter.weights)
        engine = make_engine(decoder)
        driver = Driver(engine, 0)
        readers.append(driver.submit([*PROMPT, number % 3], GREEDY))
        driver.drain()
        engine.runner.close()
    assert len({tuple(reader.output) for reader in readers}) == len(readers), "they matter"
    return readers


@pytest.mark.parametrize(
    ("what", "num_adapter_slots", "settings"),
    [
        ("alone", 1, {}),
        ("all in one step", 8, {}),
        ("fewer slots than adapters", 3, {}),
        ("chunks of one", 8, {"budget": 8}),
        ("prefix cache and chunks", 4, {"caching": True, "budget": 11}),
        ("preemption", 8, {"num_blocks": 17}),
        ("everything", 2, {"num_blocks": 17, "budget": 11, "caching": True}),
    ],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_the_tokens_of_merged_weights(
    what: str, num_adapter_slots: int, settings: dict[str, Any], depth: int,
    adapters: list[Adapter | None], merged: list[Reader],
) -> None:  # fmt: skip
    engine = make_engine(make_decoder(num_adapter_slots), **settings)
    order = [*range(len(adapters))] * (2 if "caching" in settings else 1)
    readers = generate(engine, [adapters[i] for i in order], depth=depth, alone=what == "alone")
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in settings)
    assert (engine.scheduler.num_cached_tokens > 0) == ("caching" in settings)
    for reader, number in zip(readers, order, strict=True):
        expected = merged[number]
        assert reader.prompt == expected.prompt
        assert reader.output == expected.output or is_near_tie(reader, expected)


def test_the_ledger_has_the_slots(tmp_path: Path) -> None:
    config = engine_config(write_model(tmp_path / "tiny"))
    model_config = ModelConfig.from_path(config.model_path)
    ledgers = []
    for num_slots in (0, 4):
        placement = Placement(
            torch.float32, META, num_adapter_slots=num_slots,
            max_adapter_rank=MAX_RANK if num_slots else 0,
        )  # fmt: skip
        shapes = build_model(model_config, placement, max_model_len=1)
        plan = plan_memory(shapes, config, weight_bytes=1000, memory=HostMemory(2**30))
        ledgers.append(dict(plan.ledger))
    without, with_slots = ledgers
    assert "adapters" not in without
    real = make_decoder(4)
    assert with_slots["adapters"] == real.adapter_bytes
    assert with_slots["activations"] > without["activations"]


def test_the_churn_of_versions() -> None:
    """Loads, reloads and unloads under streams: every stream gets the answer of the one version
    that it has begun with, and in the end nothing is left."""
    decoder = make_decoder(2)
    targets = make_decoder(1)
    made: dict[int, AdapterWeights] = {}
    read: list[int] = []

    def read_folder(folder: Path) -> AdapterWeights:
        seed = int(folder.name)
        read.append(seed)
        if seed not in made:
            made[seed] = make_weights(targets, seed)
        return made[seed]

    async def run() -> None:
        rng = random.Random(7)
        engine = make_engine(decoder, caching=True)
        store = HostAdapters(read_folder, limit=3)
        info = EngineInfo(
            max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=8,
            block_size=BLOCK_SIZE, num_blocks=128, dtype="float32", device="cpu",
            num_adapter_slots=2,
        )  # fmt: skip
        served = AsyncEngine(engine, info, adapters=store)
        served.start()
        answers: dict[int, set[tuple[int, ...]]] = {}
        names = ["x", "y", "z", "w"]
        for seed, name in enumerate(names):
            await store.load(name, str(seed))

        async def ask() -> None:
            adapter = await store.acquire(rng.choice(names))
            seed = next(seed for seed, weights in made.items() if weights is adapter.weights)
            stream = served.submit(
                SequenceRequest(PROMPT[:20], SamplingParams(max_tokens=6, temperature=0.0),
                                adapter=adapter)
            )  # fmt: skip
            output: list[int] = []
            while True:
                delta = await stream.read()
                output += delta.token_ids
                if delta.finish_reason is not None:
                    break
            answers.setdefault(seed, set()).add(tuple(output))
            store.release(adapter)
            store.check_invariants()

        async def change(number: int) -> None:
            name = rng.choice(names)
            if rng.random() < 0.3 and store.has(name):
                store.unload(name)
                await store.load(name, str(number % NUM_ADAPTERS))
            else:
                await store.load(name, str(number % NUM_ADAPTERS), is_reload=True)

        for number in range(120):
            asking = [ask() for _ in range(rng.randrange(1, 4))]
            results = await asyncio.gather(*asking, change(number), return_exceptions=True)
            failed = [it for it in results if it is not None]
            # A name is not served for as long as another adapter is read for it.
            assert all(isinstance(it, NotFoundError) for it in failed), failed
        assert len(answers) == NUM_ADAPTERS
        assert all(len(given) == 1 for given in answers.values()), "a mixture"
        assert len(set.union(*answers.values())) == NUM_ADAPTERS
        assert store.num_kept <= 3 and not store._num_holders
        engine.check_invariants()
        assert engine.scheduler.adapters.num_used == 0
        await served.stop()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert len(read) > 100
