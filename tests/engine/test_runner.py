"""The engine on a real model at float32: the oracle of design 10, NaN, failing steps, memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyserve import ops
from pyserve.client import EngineInfo, SequenceRequest
from pyserve.config import LogprobsMode
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import Step, StepShape, max_update_words, pack
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cpu_runner import CpuRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.planner import HostMemory, plan_memory
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.engine.warmup import warmup_steps
from pyserve.errors import EngineError
from pyserve.model.build import build_model
from pyserve.model.config import ModelConfig
from pyserve.model.context import ForwardContext
from pyserve.model.decoder import Decoder
from pyserve.model.placement import META, Placement
from pyserve.params import SamplingParams
from tests.engine.after_the_end import stop_and_check
from tests.engine.driver import Driver, Reader
from tests.engine.tiny import CONFIG, VOCAB_SIZE, engine_config

MAX_MODEL_LEN = 256
BLOCK_SIZE = 16
MAX_GAP = 1e-4  # of the top two logits, below which another choice is rounding
NAN_TOKEN = 13


def make_decoder() -> Decoder:
    """Weights so large that the next token depends on all before it."""
    config = ModelConfig.from_hf(CONFIG)
    decoder = build_model(config, Placement(torch.float32, torch.device("cpu")))
    generator = torch.Generator().manual_seed(5)
    for name, place in decoder.destinations().items():
        noise = torch.randn(place.view.shape, generator=generator)
        place.view.copy_(1 + 0.1 * noise if "norm" in name else 0.35 * noise)
    return decoder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def limits(budget: int, logits_tile_rows: int) -> StepLimits:
    return StepLimits(
        block_size=BLOCK_SIZE, num_slots=8, max_num_batched_tokens=budget,
        max_model_len=MAX_MODEL_LEN, logits_tile_rows=logits_tile_rows,
    )  # fmt: skip


def make_runner(
    decoder: Decoder, num_blocks: int, budget: int, logits_tile_rows: int = 64, *,
    logprobs_mode: LogprobsMode = "raw_logprobs",
) -> CpuRunner:  # fmt: skip
    executor = StepExecutor(decoder, limits(budget, logits_tile_rows), logprobs_mode=logprobs_mode)
    executor.allocate_kv(num_blocks)
    return CpuRunner(executor, num_threads=1)


def make_engine(
    decoder: Decoder, *, num_blocks: int = 128, budget: int = 512, caching: bool = False,
    logits_tile_rows: int = 64, logprobs_mode: LogprobsMode = "raw_logprobs",
) -> Engine:  # fmt: skip
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching),
        SlotAllocator(8),
        max_num_batched_tokens=budget,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
    )
    return Engine(
        scheduler,
        make_runner(decoder, num_blocks, budget, logits_tile_rows, logprobs_mode=logprobs_mode),
        max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, policy="fcfs",
    )  # fmt: skip


def requests() -> list[tuple[list[int], SamplingParams]]:
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(VOCAB_SIZE, (40,), generator=generator).tolist()
    params = [
        SamplingParams(max_tokens=40, temperature=0.0),
        SamplingParams(max_tokens=40, temperature=1.0, seed=11),
        SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, top_k=20, seed=-12),
        SamplingParams(
            max_tokens=40, temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4
        ),
        SamplingParams(
            max_tokens=40, temperature=1.2, min_p=0.05, presence_penalty=0.8, seed=3,
            logit_bias={5: 2.0, 6: -50.0}, stop_token_ids=(7, 8, 9, 10), min_tokens=12,
        ),
        SamplingParams(max_tokens=40, temperature=1.0, seed=11, sample_index=1),
    ]  # fmt: skip
    tails = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in range(1, 7)]
    return [(prefix + tail, param) for tail, param in zip(tails, params, strict=True)]


def generate(engine: Engine, *, depth: int = 0, alone: bool = False) -> list[Reader]:
    driver = Driver(engine, depth)
    for prompt, params in requests():
        driver.submit(prompt, params)
        if alone:
            driver.drain()
    driver.drain()
    engine.check_invariants()
    engine.runner.close()
    return driver.readers


@pytest.fixture(scope="module")
def baseline(decoder: Decoder) -> list[Reader]:
    """Each sequence alone, its prompt in one piece, nothing cached."""
    readers = generate(make_engine(decoder), alone=True)
    assert len({tuple(reader.output[:10]) for reader in readers}) == len(readers)
    assert len(set(readers[0].output)) > 10, "a model that repeats itself shows little"
    stops = readers[4]
    assert len(stops.output) >= 12 and not set(stops.output[:11]) & {7, 8, 9, 10}
    assert 6 not in stops.output
    return readers


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("batch mates", {}),
        ("chunks", {"budget": 9}),
        ("chunks of one", {"budget": 8}),
        ("prefix cache", {"caching": True}),
        ("prefix cache and chunks", {"caching": True, "budget": 11}),
        ("preemption", {"num_blocks": 17}),
        ("everything", {"num_blocks": 17, "budget": 11, "caching": True}),
    ],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_the_same_tokens(
    what: str, settings: dict[str, int], depth: int, decoder: Decoder, baseline: list[Reader]
) -> None:
    engine = make_engine(decoder, **settings)  # type: ignore[arg-type]
    readers = generate(engine, depth=depth)
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in settings)
    assert (engine.scheduler.num_cached_tokens > 0) == ("caching" in settings)
    for reader, expected in zip(readers, baseline, strict=True):
        if reader.output != expected.output:
            assert reader.params.temperature == 0.0, "sampled differently"
            assert_near_tie(decoder, reader, expected)
        else:
            assert reader.finish_reason == expected.finish_reason


def assert_near_tie(decoder: Decoder, reader: Reader, expected: Reader) -> None:
    """The first token that differs may be one of two that are as good."""
    pairs = zip(reader.output, expected.output, strict=False)
    index = next(i for i, (a, b) in enumerate(pairs) if a != b)
    assert not reader.params.has_penalties
    logits: list[torch.Tensor] = []
    engine = make_engine(decoder)
    compute_logits = decoder.compute_logits

    def spy(hidden: torch.Tensor, out: torch.Tensor, parts: torch.Tensor | None = None) -> None:
        compute_logits(hidden, out, parts)
        logits.append(out.clone())

    decoder.compute_logits = spy  # type: ignore[method-assign]
    try:
        engine.add(
            SequenceRequest(reader.prompt + reader.output[:index], SamplingParams(max_tokens=1))
        )
        engine.step()
    finally:
        decoder.compute_logits = compute_logits  # type: ignore[method-assign]
        engine.runner.close()
    top = logits[0][0].topk(2).values
    assert top[0] - top[1] < MAX_GAP


def test_a_second_turn_is_served_from_the_cache(decoder: Decoder) -> None:
    outputs = []
    for caching in (False, True):
        driver = Driver(make_engine(decoder, caching=caching), 0)
        prompt, params = requests()[1]
        first = driver.submit(prompt, params)
        driver.drain()
        second = driver.submit(prompt + first.output + [1, 2, 3], params)
        driver.drain()
        assert second.stream.num_cached_tokens == (80 if caching else 0)
        outputs.append((first.output, second.output))
        driver.engine.runner.close()
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 0.01}, {"temperature": 2.0}, {"top_p": 1e-9}, {"min_p": 1.0},
        {"min_p": 1e-300}, {"top_k": 2**31 - 1}, {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0}, {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"presence_penalty": 1e-300}, {"seed": -(2**63)}, {"seed": 2**63 - 1},
        {"logit_bias": dict.fromkeys(range(VOCAB_SIZE), -100.0)}, {"logit_bias": {0: 1e-300}},
        {"stop_token_ids": tuple(range(64)), "min_tokens": 3},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_params_accept_can_be_sampled(extreme: dict[str, object]) -> None:
    """The device checks its float32 words again: a value it refused would fail a whole step."""
    engine = make_engine(make_decoder())
    driver = Driver(engine, 0)
    driver.submit([1, 2, 3], SamplingParams(**{"max_tokens": 4, **extreme}))  # type: ignore[arg-type]
    driver.drain()
    engine.runner.close()
    assert driver.readers[0].output and driver.readers[0].error is None


@pytest.mark.parametrize("depth", [0, 1])
def test_nan_fails_its_row_alone(depth: int, decoder: Decoder, baseline: list[Reader]) -> None:
    poisoned = make_decoder()
    poisoned.embedding.weight[NAN_TOKEN] = torch.nan
    engine = make_engine(poisoned, num_blocks=30, caching=True, budget=20)
    driver = Driver(engine, depth)
    [(prompt, params), *_] = requests()
    assert NAN_TOKEN not in prompt + baseline[0].output
    bad = [driver.submit([*prompt, NAN_TOKEN, i], params) for i in range(2)]
    good = driver.submit(prompt, params)
    for _ in range(3):  # blocks that held NaN are used again
        driver.drain()
        assert all(isinstance(reader.error, EngineError) for reader in bad)
        assert all("not a number" in str(reader.error) for reader in bad)
        assert good.output == baseline[0].output
        good = driver.submit(prompt, params)
    driver.drain()
    engine.check_invariants()
    engine.runner.close()


def test_a_step_that_raises_fails_its_sequences_only(
    decoder: Decoder, baseline: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(decoder, budget=20, caching=True)
    driver = Driver(engine, 0)
    [(prompt, params), *_] = requests()
    lost = driver.submit(prompt, params)
    driver.launch()
    driver.update()

    def broken(ctx: object) -> torch.Tensor:
        raise RuntimeError("as wanted")

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", broken)
        driver.launch()
        driver.update()
    assert isinstance(lost.error, EngineError) and "as wanted" not in str(lost.error)
    again = driver.submit(prompt, params)
    driver.drain()
    assert again.output == baseline[0].output
    assert again.stream.num_cached_tokens == 16, "what was whole before the step is kept"
    engine.runner.close()


def test_steps_run_in_a_few_padded_shapes(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: set[tuple[int, int]] = set()
    forward, compute_logits = decoder.forward, decoder.compute_logits

    def spy_forward(ctx: ForwardContext) -> torch.Tensor:
        shapes.add((len(ctx.input_ids), len(ctx.row_slots)))
        return forward(ctx)

    def spy_logits(
        hidden: torch.Tensor, out: torch.Tensor, parts: torch.Tensor | None = None
    ) -> None:
        num_rows.add(len(hidden))
        compute_logits(hidden, out, parts)

    num_rows: set[int] = set()
    monkeypatch.setattr(decoder, "forward", spy_forward)
    monkeypatch.setattr(decoder, "compute_logits", spy_logits)
    generate(make_engine(decoder, budget=50))
    assert {num_tokens for num_tokens, _ in shapes} <= {1, 2, 4, 8, 16, 32, 48, 50}
    assert {rows for _, rows in shapes} | num_rows <= {1, 2, 4, 8}
    assert len(shapes) > 4 and len(num_rows) > 2


@pytest.mark.parametrize(("budget_s", "num_shapes"), [(60.0, 8), (-1.0, 0)])
def test_warm_up_meets_every_shape_in_its_budget(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, budget_s: float, num_shapes: int
) -> None:
    shapes: list[int] = []
    warm_up = decoder.warm_up

    def spy(ctx: ForwardContext) -> None:
        shapes.append(len(ctx.input_ids))
        warm_up(ctx)

    monkeypatch.setattr(decoder, "warm_up", spy)
    runner = make_runner(decoder, 4, 50)
    executor = runner._executor
    runner.warm_up(list(warmup_steps(executor.limits))[::-1], budget_s=budget_s)
    assert shapes == [1, 2, 4, 8, 16, 32, 48, 50][:num_shapes]
    assert not executor._state.slots.any() and not executor._state.token_counts.any()
    runner.close()


def test_what_an_earlier_step_has_left_is_not_read(
    decoder: Decoder, baseline: list[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations and tiles of logits hold NaN whenever a step begins."""
    engine = make_engine(decoder, budget=50)
    runner = engine.runner
    assert isinstance(runner, CpuRunner)
    state = runner._executor._state
    plan_step = ops.plan_step

    def poison(*args: Any) -> None:
        state.activations.fill_(0xFF)
        state.logits.fill_(torch.nan)
        state.hidden.fill_(torch.nan)
        plan_step(*args)

    monkeypatch.setattr(ops, "plan_step", poison)
    readers = generate(engine)
    assert [reader.output for reader in readers] == [reader.output for reader in baseline]


def test_many_samples_go_through_logits_in_tiles(decoder: Decoder) -> None:
    outputs = [
        [reader.output for reader in generate(make_engine(decoder, logits_tile_rows=tile_rows))]
        for tile_rows in (4, 64)
    ]
    assert outputs[0] == outputs[1]


def test_memory_is_what_the_planner_says(decoder: Decoder) -> None:
    config = engine_config(Path("unused"))
    shapes = build_model(decoder.config, Placement(torch.float32, META), max_model_len=1)
    weight_bytes = sum(place.nbytes for place in shapes.destinations().values())
    plan = plan_memory(shapes, config, weight_bytes=weight_bytes, memory=HostMemory(2**30))
    assert config.max_num_batched_tokens is not None
    runner = make_runner(decoder, plan.num_blocks, config.max_num_batched_tokens)
    executor = runner._executor
    for step in warmup_steps(executor.limits):
        runner.run(step)
        executor.reset()
    ledger = dict(plan.ledger)
    parts = [*decoder.layers, decoder]
    weights = {
        id(tensor): tensor.nbytes
        for tensor in _tensors(parts)
        if tensor.data_ptr() != decoder.layers[0].attention.cos_sin.data_ptr()
    }
    assert ledger["weights"] == sum(weights.values())
    assert ledger["rope table"] == decoder.layers[0].attention.cos_sin.nbytes
    assert ledger["KV cache"] == sum(k.nbytes + v.nbytes for k, v in executor._kv_caches)
    held = [value for name, value in vars(executor).items() if name != "_model"]
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(held)}
    assert sum(storages.values()) == plan.total_bytes - ledger["weights"] - ledger["rope table"]
    assert tuple((name, ledger[name]) for name, _ in executor._state.ledger()) == (
        executor._state.ledger()
    )
    runner.close()


def _storages(things: list[object]) -> Iterator[torch.UntypedStorage]:
    return (tensor.untyped_storage() for tensor in _tensors(things))


def _tensors(things: list[object]) -> Iterator[torch.Tensor]:
    """Every tensor reachable through the attributes of the model's parts."""
    seen: set[int] = set()
    while things:
        thing = things.pop()
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, (list, tuple)):
            things += thing
        elif isinstance(thing, dict):
            things += thing.values()
        elif type(thing).__module__.startswith("pyserve.") and id(thing) not in seen:
            seen.add(id(thing))
            names = getattr(type(thing), "__slots__", None) or vars(thing)
            things += [getattr(thing, name) for name in names]


def test_steps_execute_in_the_order_of_their_launch(decoder: Decoder) -> None:
    """Two steps in flight: the second one's input is what the first one sampled."""
    engine = make_engine(decoder)
    [(prompt, params), *_] = requests()
    engine.add(SequenceRequest(prompt, params))
    steps: list[Step] = []
    results = []
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        engine.runner.attach(loop)
        for _ in range(3):
            step = engine.schedule()
            assert step is not None
            steps.append(step)
            results.append(engine.runner.launch(step).sample())
        assert [step.host_tokens for step in steps] == [[prompt], [None], [None]]
        outputs = [loop.run_until_complete(result) for result in results]
    for step, output in zip(steps, outputs, strict=True):
        engine.update(step, output)
    seq = engine.scheduler.running[0]
    tokens = [token_id for output in outputs for [token_id] in output.token_ids]
    assert seq.token_ids == prompt + tokens and seq.num_in_flight_tokens == 0
    engine.runner.close()


def test_bytes_and_their_shape_are_all_that_an_executor_needs(decoder: Decoder) -> None:
    """As a rank would run it, which has neither the sequences nor the Step."""
    engine = make_engine(decoder)
    for prompt, params in requests():
        engine.add(SequenceRequest(prompt, params))
    rank = StepExecutor(decoder, limits(512, 64))
    rank.allocate_kv(128)
    buffer = np.zeros(len(rank.step_input), np.int32)
    for _ in range(20):
        step = engine.schedule()
        assert step is not None
        received = np.frombuffer(buffer[: pack(step, buffer)].tobytes(), np.int32)
        rank.step_input[: len(received)] = torch.tensor(received)
        shape = StepShape.of(received)
        rank.forward(shape)
        sampled = rank.sample(shape)[: shape.num_samples].tolist()
        output = engine.runner.run(step)
        assert output.token_ids == [[token_id] for token_id in sampled]
        assert output.logprobs is None
        engine.update(step, output)
    rank.close()
    engine.runner.close()


def test_every_call_after_the_end_has_an_answer(decoder: Decoder) -> None:
    async def run() -> None:
        engine = make_engine(decoder)
        info = EngineInfo(
            max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=8,
            block_size=BLOCK_SIZE, num_blocks=128, dtype="float32", device="cpu",
        )  # fmt: skip
        client = AsyncEngine(engine, info)
        client.start()
        stream = client.submit(
            SequenceRequest([1] * 10, SamplingParams(max_tokens=200, temperature=0.0))
        )
        await stream.read()
        await stop_and_check(client, engine, stream)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_closed_executor_tells_its_device_and_runs_nothing(decoder: Decoder) -> None:
    executor = StepExecutor(decoder, limits(16, 8))
    for _ in range(2):
        executor.close()
    assert executor.device == decoder.device and executor.limits.max_num_batched_tokens == 16
    with pytest.raises(RuntimeError, match="closed"):
        executor.forward(StepShape(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="closed"):
        executor.sample(StepShape(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match="closed"):
        executor.allocate_kv(1)
    with pytest.raises(RuntimeError, match="closed"):
        executor.reset()
